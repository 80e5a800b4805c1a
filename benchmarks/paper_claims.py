"""The paper's claims in miniature: is upcycling worth it, does the synthetic finale help, which strategy, which gate?

python benchmarks/paper_claims.py --workdir=runs/claims [--seeds=5] [--parts=finale,pairs] [--ja='ja/*.gz' --en='en/*.gz']

Every run is an ordinary recipe (`get_config` below; rule-made text unless files are given), so the same command
goes on where it was stopped.  Seeds change the data, the initial weights and the order.  Differences are taken within a seed,
and given with the 95 % interval of Student's t over seeds.  Writes report.md and claims.svg to the workdir.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
DENSE_TOKENS, FURTHER, FINALE, SFT, DPO_STEPS = 2_500_000, 1_200_000, 300_000, 500_000, 80
# So small that the dense model has little left to learn when it is upcycled, as the original had.
MODEL = dict(n_layers=2, d_model=48, d_ff=144, n_heads=2, n_kv_heads=2, head_dim=24)
GENERAL = dict(ja=(0.35,), en=(0.25,), synthetic_ja=(0.24,), synthetic_en=(0.16,))
SYNTHETIC = dict(synthetic_ja=(0.6,), synthetic_en=(0.4,))
FIXED = 0.02  # coefficient of the balancing loss
STRATEGIES = dict(
    copy=dict(strategy="copy"), noise=dict(strategy="noise", noise_std=1e-3), drop=dict(strategy="drop", drop_ratio=0.5)
)
OWN_LOSSES = {  # of the stages that train on its own pairs
    "dpo_own": dict(beta=0.1, router_aux_loss=0.0),
    "dpo_own_sft": dict(beta=0.1, router_aux_loss=0.0, preference=dict(sigmoid=1.0, sft=1.0)),
}
PARTS = ("main", "groups", "plain", "finale", "pairs")
PARENTS = ("pretrain", "noise_up", "noise")  # stages of `main` that other parts start from
OWN = dict(prompts=2_000, samples=4)  # of the model's own answers, from which the rules' checker makes pairs


def get_config(argument="main.0"):
    """The recipe of a part and seed: `groups` and `plain` have models of another shape, `finale` and `pairs` are scored."""
    import runpy

    from tanuki_jax import config, model

    part, seed = argument.split(".")
    c = runpy.run_path(str(ROOT / "configs" / "nano.py"))["get_config"]()
    c.name, c.seed = f"claims, {part}, seed {seed}", int(seed)
    c.stages, c.data.pairs, c.rules.pairs = dict(), "rules:pairs", 2_400
    c.model.update(MODEL)
    c.tensorboard = False
    c.validation.update(dict(tokens=8_192, every_steps=100))
    if part == "groups":
        c.model.update(dict(expert_d_ff=c.model.d_ff // 2, n_experts=16, top_k=4))
    c.model.normalized_gate = part != "plain"
    if part not in ("finale", "pairs"):
        c.scoring.update(dict(prompts=0, pairs=0))
    shape = config.read_model({"model": c.model.to_dict()})
    row = dict(seq_len=128, batch_size=16, save_every=10_000, log_every=20)

    def train(init_from, tokens, mixture=GENERAL, peak=1.5e-3, loss=None, kind="pretrain", **options):
        adam = dict(learning_rate=peak, learning_rate_floor=peak / 20, warmup_ratio=0.05, clip_norm=1.0)
        loss = dict(router_aux_loss=FIXED) | (loss or {})
        settings = dict(init_from=init_from, mixture=mixture, tokens=tokens, optimizer=adam, loss=loss)
        return config.stage(kind, **{**row, **settings, **options})

    if part == "main":
        import dataclasses

        flops = [model.flops_per_token(m, row["seq_len"]) for m in (shape, dataclasses.replace(shape, n_experts=0))]
        c.stages.pretrain = train("", DENSE_TOKENS, peak=2e-3)
        c.stages.dense = train("pretrain", round(FURTHER * flops[0] / flops[1]))
        c.stages.scratch = train("", FURTHER, peak=2e-3, moe=True)
        for name, options in STRATEGIES.items():
            c.stages[f"{name}_up"] = config.stage("upcycle", init_from="pretrain", upcycle=options)
            c.stages[name] = train(f"{name}_up", FURTHER)
        c.stages.adaptive = train("noise_up", FURTHER, loss=dict(router_aux_adaptive=0.2))
    elif part == "finale":
        moe = dict(moe=True)
        c.stages.general = train("set by --config.stages", FINALE, peak=7e-4, **moe)
        c.stages.synthetic = train("set by --config.stages", FINALE, SYNTHETIC, peak=7e-4, **moe)
        c.stages.sft = train("synthetic", SFT, dict(dialogues=(1.0,)), 1e-3, kind="sft")
        c.stages.dpo = train(
            "sft", 0, dict(pairs=(1.0,)), 5e-5, dict(beta=0.1, router_aux_loss=0.0), kind="dpo", steps=DPO_STEPS, seq_len=256
        )
    elif part == "pairs":  # DPO of the same SFT model, steps and rates, on pairs between its own answers
        own = dict(items=OWN["prompts"], samples=OWN["samples"], generator="own", judge="rules")
        c.synth.pairs = config.synth("preferences", seeds=dict(prompts="rules:prompts"), **own)
        c.data.own_pairs = "synth:pairs"
        c.stages.samples = config.stage("synth", init_from="set by --config.stages", moe=True, synth="pairs")
        preference = dict(kind="dpo", steps=DPO_STEPS, seq_len=256, moe=True)
        for name, loss in OWN_LOSSES.items():
            c.stages[name] = train("set by --config.stages", 0, dict(own_pairs=(1.0,)), 5e-5, loss, **preference)
    else:
        strategy = dict(strategy="groups") if part == "groups" else STRATEGIES["noise"]
        c.stages[f"{part}_up"] = config.stage("upcycle", init_from="set by --config.stages", upcycle=strategy)
        c.stages[part] = train(f"{part}_up", FURTHER)
    return c


# --- running ------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs what is missing of every seed, then writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS), help="of what is compared; others train no more than these need")
    parser.add_argument("--ja", default="", help="files of Japanese text in place of the rule-made documents")
    parser.add_argument("--en", default="", help="the same of English")
    parser.add_argument("--report_only", action="store_true", help="only write the report of what is there")
    options = parser.parse_args()
    wanted = {*options.parts.split(",")}
    if not wanted <= {*PARTS} or ("pairs" in wanted and "finale" not in wanted):
        parser.error(f"--parts: choose from {', '.join(PARTS)}; pairs needs finale")
    options.parts = [part for part in PARTS if part in wanted]
    options.workdir.mkdir(parents=True, exist_ok=True)
    clock = options.workdir / "seconds.json"
    spent = json.loads(clock.read_text()) if clock.is_file() else {}
    for seed in range(0 if options.report_only else options.seeds):
        for part in PARTS:
            if part not in ("main", *options.parts):
                continue
            began = time.monotonic()
            run(options, part, seed)
            spent[f"{part}-{seed}"] = max(spent.get(f"{part}-{seed}", 0), time.monotonic() - began)
            clock.write_text(json.dumps(spent))
    last = options.parts[-1]
    seeds = [seed for seed in range(options.seeds) if (options.workdir / f"{last}-{seed}" / "summary.json").is_file()]
    found = [read(options, seed) for seed in seeds]
    report = written(options, found, sum(spent.values()))
    (options.workdir / "report.md").write_text(report, encoding="utf-8")
    if options.parts == [*PARTS]:
        picture(found, options.workdir / "claims.svg")
    print(report)


def run(options: argparse.Namespace, part: str, seed: int) -> None:
    """One recipe in a process of its own; a finished one returns at once."""
    home, base = options.workdir / f"{part}-{seed}", options.workdir / f"main-{seed}"
    if (home / "summary.json").is_file():
        return
    starts = dict(groups=("groups_up",), plain=("plain_up",), finale=("general", "synthetic"))
    starts |= dict(pairs=("samples", *OWN_LOSSES))
    parent = base.absolute() / "stages" / ("noise" if part == "finale" else "pretrain")
    if part == "pairs":
        parent = (options.workdir / f"finale-{seed}" / "stages" / "sft").absolute()
    flags = [f"--config.stages.{name}.init_from={parent}" for name in starts.get(part, ())]
    flags += [f"--config.tokenizer.path={parent / 'tokenizer'}"] if part != "main" else []
    flags += [f"--config.data.{name}={files}" for name, files in (("ja", options.ja), ("en", options.en)) if files]
    config = [f"--config={Path(__file__).absolute()}:{part}.{seed}", *flags, f"--workdir={home}"]
    verbs = [["run"]] if part in options.parts else [["train", f"--stage={stage}"] for stage in PARENTS]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(options.workdir.absolute() / "cache")}
    with (options.workdir / f"{part}-{seed}.log").open("w") as log:
        for verb in verbs:
            command = [sys.executable, "-m", "tanuki_jax.cli", *verb, *config]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log)
            assert done.returncode == 0, f"see {log.name}"
    print(f"{part}, seed {seed}: done", file=sys.stderr, flush=True)


# --- reading ------------------------------------------------------------------------------------------------------------------


def read(options: argparse.Namespace, seed: int) -> dict[str, dict]:
    """Of each stage of a seed: the held-out loss over training, its scores, and the health of its experts at the end."""
    workdir, result = options.workdir, {}
    for part in options.parts:
        summary = json.loads((workdir / f"{part}-{seed}" / "summary.json").read_text(encoding="utf-8"))
        for entry in summary["stages"]:
            path = workdir / f"{part}-{seed}" / "stages" / entry["name"] / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
            curve = [(row["tokens"], held_out(row)) for row in rows if "validation/ja/loss" in row]
            health = {
                name: float(np.mean([np.mean(row[name]) for row in rows[-5:]]))
                for name in ("moe/similarity", "moe/load_max", "moe/load_entropy", "moe/router_norm")
                if rows and name in rows[-1]
            }
            result[entry["name"]] = {"curve": curve, "scores": entry["scores"], "tokens": entry["tokens"], **health}
            result[entry["name"]]["loss"] = curve[-1][1] if curve else None
    return result


def held_out(row: dict) -> float:
    """Held-out loss over the sources as the general mixture weighs them, nats a token."""
    return sum(weight[0] * row[f"validation/{name}/loss"] for name, weight in GENERAL.items())


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval of Student's t."""
    from scipy import stats

    array = np.array(values)
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else float("nan")
    return float(array.mean()), float(half)


def verdict(mean: float, half: float, better_is_lower: bool) -> str:
    """Whether the interval leaves 0 out, and on which side."""
    if not abs(mean) > half:
        return "undecided"
    return "holds" if (mean < 0) == better_is_lower else "does not hold"


METRICS = {  # unit, and whether less is better
    "exact_match": ("points", False),
    "pair_accuracy": ("points", False),
    "loss": ("nats", True),
    "moe/load_max": ("x mean", True),
}
CLAIMS = (  # the first stage over the second
    ("a: synthetic finale over general finale, exact answers", "synthetic", "general", "exact_match"),
    ("b: upcycled over dense continued, held-out loss", "noise", "dense", "loss"),
    ("b: upcycled over mixture from scratch, held-out loss", "noise", "scratch", "loss"),
    ("c: SFT over the finale, exact answers", "sft", "synthetic", "exact_match"),
    ("c: DPO on rule-made pairs over SFT, exact answers", "dpo", "sft", "exact_match"),
    ("c: DPO on rule-made pairs over SFT, right answer preferred", "dpo", "sft", "pair_accuracy"),
    ("c: DPO on its own pairs over SFT, exact answers", "dpo_own", "sft", "exact_match"),
    ("c: DPO on its own pairs over SFT, right answer preferred", "dpo_own", "sft", "pair_accuracy"),
    ("c: DPO on its own pairs over rule-made pairs, exact answers", "dpo_own", "dpo", "exact_match"),
    ("c: DPO on its own pairs with the SFT loss over SFT, exact answers", "dpo_own_sft", "sft", "exact_match"),
    ("d: noise over copy, held-out loss", "noise", "copy", "loss"),
    ("d: drop 0.5 over copy, held-out loss", "drop", "copy", "loss"),
    ("d: virtual groups over copy, held-out loss", "groups", "copy", "loss"),
    ("e: normalised over plain gate, held-out loss", "noise", "plain", "loss"),
    ("e: normalised over plain gate, largest load", "noise", "plain", "moe/load_max"),
    ("e: adaptive over fixed coefficient, held-out loss", "adaptive", "noise", "loss"),
    ("e: adaptive over fixed coefficient, largest load", "adaptive", "noise", "moe/load_max"),
)


def effects(found: list[dict]) -> list[tuple[str, str, float, float, str]]:
    """Claim, unit, mean difference, half interval and verdict of each comparison whose stages there are."""

    def value(stage: dict, metric: str) -> float:
        return stage[metric] if metric in stage else 100 * stage["scores"][metric]

    result = []
    for claim, first, second, metric in CLAIMS:
        if all({first, second} <= seed.keys() for seed in found):
            mean, half = interval([value(seed[first], metric) - value(seed[second], metric) for seed in found])
            unit, lower = METRICS[metric]
            result.append((claim, unit, mean, half, verdict(mean, half, lower)))
    return result


NAMES = {
    "pretrain": "dense, before",
    "dense": "dense, continued",
    "scratch": "mixture from scratch",
    "noise": "upcycled: noise 0.001",
    "copy": "upcycled: copy",
    "drop": "upcycled: drop 0.5",
    "groups": "upcycled: virtual groups (16 halves, top-4)",
    "plain": "noise, plain gate",
    "adaptive": "noise, adaptive coefficient",
}


def written(options: argparse.Namespace, found: list[dict], seconds: float) -> str:
    """The report."""
    lines = [
        f"# The paper's claims in miniature, {time.strftime('%Y-%m-%d')}",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores; {len(found)} seeds, {seconds / 60:.0f} minutes in all.",
        "",
        f"    python benchmarks/paper_claims.py --workdir=runs/claims --seeds={options.seeds}"
        + (f" --parts={','.join(options.parts)}" if options.parts != [*PARTS] else "")
        + "".join(f" --{name}=..." for name in ("ja", "en") if getattr(options, name)),
        "",
        f"A model of 2 layers, D 48, F 144 (8 experts, top-2): {DENSE_TOKENS:,} tokens dense, then {FURTHER:,} as a mixture.",
        "Mean difference within a seed, with the 95 % interval of Student's t; `holds` where the interval leaves 0 out.",
        "",
        "| claim | unit | difference | 95 % interval | |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {c} | {u} | {m:+.4f} | {m - h:+.4f} to {m + h:+.4f} | {v} |" for c, u, m, h, v in effects(found)]
    if "dense" in found[0]:
        continued = f"The dense model goes on for {found[0]['dense']['tokens']:,}, which are as many FLOPs"
        lines += ["", f"{continued}; a mixture from scratch gets the same."]
    runs = []
    for name in (name for name in NAMES if name in found[0]):
        keys = ("loss", "moe/similarity", "moe/load_max", "moe/load_entropy")
        cells = [f"{np.mean([seed[name][k] for seed in found]):.4f}" if k in found[0][name] else "" for k in keys]
        runs.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    if runs:
        header = "| run | held-out loss | similarity of experts | largest load / mean | entropy of load |"
        lines += ["", header, "|---|---|---|---|---|", *runs]
    lines += ["", "| after | exact answers, % | right answer preferred, % |", "|---|---|---|"]
    for name in ("general", "synthetic", "sft", "dpo", *OWN_LOSSES):
        cells = [interval([100 * seed[name]["scores"][key] for seed in found]) for key in ("exact_match", "pair_accuracy")]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.1f} ± {half:.1f}" for mean, half in cells) + " |")
    return "\n".join(lines) + "\n"


def picture(found: list[dict], path: Path) -> None:
    """Held-out loss over further compute, and the scores of the stages."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import matplotlib_fontja

    matplotlib_fontja.japanize()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    runs = dict(dense=("密 (dense, continued)", "#4269d0"), scratch=("専門家混合、初めから (mixture, from scratch)", "#999999"))
    runs |= dict(noise=("専門家混合、アップサイクル (upcycled)", "#ff725c"))
    for name, (label, colour) in runs.items():
        curves = np.array([[loss for _, loss in seed[name]["curve"]] for seed in found])
        x = np.array([tokens for tokens, _ in found[0][name]["curve"]]) / found[0][name]["tokens"]
        left.plot(x, curves.mean(axis=0), color=colour, label=label)
        left.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    start = np.mean([seed["pretrain"]["loss"] for seed in found])
    left.axhline(start, color="#4269d0", linewidth=0.8, linestyle=":")
    left.annotate("分岐前 (before)", (1, start), ha="right", va="bottom", fontsize=8, color="#4269d0")
    left.set_ylim(None, start * 1.25)
    left.set_xlabel("追加計算量の割合 (share of the further compute)")
    left.set_ylabel("損失 (held-out loss)")
    left.legend(frameon=False, fontsize=8)
    names = ("general", "synthetic", "sft", "dpo", "dpo_own")
    shown = [interval([100 * seed[name]["scores"]["exact_match"] for seed in found]) for name in names]
    colours = ["#999999", "#97bbf5", "#3ca951", "#efb118", "#ff725c"]
    right.bar(range(5), [m for m, _ in shown], yerr=[h for _, h in shown], color=colours)
    right.set_xticks(range(5), ["一般\n(general)", "合成のみ\n(synthetic)", "SFT", "DPO", "DPO\n(own pairs)"])
    right.set_ylabel("正答率 (exact answers), %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
