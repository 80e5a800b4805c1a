"""`tanuki <verb>`: parses, calls one function of a room, prints.  Heavy imports happen inside the verbs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tanuki_jax.errors import UserError

HELP = """\
A trainer in which the whole Tanuki paper is one recipe.

  tanuki run --config=configs/nano.py --workdir=runs/nano        every stage, resumable; report.html at the end
  tanuki chat --checkpoint=runs/nano/stages/dpo                  talk to the result
  tanuki plan --config=configs/tanuki_8x8b.py --topology=v5p-256 --stage=moe_01      what fits, how fast, for how many days
  tanuki run --config=configs/local_text.py --workdir=runs/mine --config.data.ja='ja/*.jsonl.gz' --config.data.en='en/*.txt'

Any key of a config can be set as --config.a.b=value.  `tanuki <verb> --help` says more.
"""


class Parser(argparse.ArgumentParser):
    """Bad flags get one line and exit code 1, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = _parser()
        config_flags = [a for a in given if a.startswith("--config")]
        options = parser.parse_args([a for a in given if a not in config_flags])
        if not hasattr(options, "work"):
            parser.print_help()
            return 0
        if config_flags and options.verb not in ("run", "train", "plan"):
            raise UserError(f"tanuki {options.verb}: takes no --config")
        options.config_flags = config_flags
        if arguments is None:
            _use_huge_pages()
        _hush()
        options.work(options)
        return 0
    except UserError as error:
        print(f"tanuki: {error}", file=sys.stderr)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("\ntanuki: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 1


def _parser() -> Parser:
    parser = Parser(prog="tanuki", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="<verb>")

    def verb(where: Any, name: str, work: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = where.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(work=work)
        return made

    for name, text in (("run", "run or resume a whole recipe"), ("train", "run or resume one stage of a recipe")):
        made = verb(verbs, name, _run, text)
        made.add_argument("--workdir", type=Path, required=True, help="where everything is written")
        made.add_argument("--allow_data_change", action="store_true", help="resume although the training data changed")
        made.epilog = "--config=FILE.py[:argument] names the recipe; --config.a.b=value sets one of its keys."
        if name == "train":
            made.add_argument("--stage", required=True, help="name of the stage")

    made = verb(
        verbs, "plan", _plan, "compile a recipe's train steps for a TPU slice that need not be here: memory, speed, days"
    )
    made.add_argument("--topology", required=True, help="v5p-256, v6e-256, v5e-256, 2xv5p-256 for two slices, ...")
    made.add_argument("--stage", default="", help="one stage; without it every stage of the recipe")
    made.add_argument("--search", action="store_true", help="try microbatches x remat x mesh, and rank what fits")
    made.add_argument(
        "--explain_sharding", action="store_true", help="how every parameter and activation is split; no compilation"
    )
    made.epilog = "--config=FILE.py[:argument] names the recipe; --config.a.b=value sets one of its keys."
    _add(made, "json")

    made = verb(verbs, "upcycle", _upcycle, "turn a dense checkpoint into a mixture of experts")
    _add(made, "checkpoint", "output")
    made.add_argument(
        "--strategy",
        choices=("copy", "noise"),
        default="noise",
        help="experts equal the dense FFN, or with noise on its weights",
    )
    made.add_argument(
        "--noise_std", type=float, default=1e-3, help="absolute standard deviation of the noise (default %(default)s)"
    )
    made.add_argument(
        "--router_std", type=float, default=0.02, help="standard deviation of the fresh router (default %(default)s)"
    )
    made.add_argument("--n_experts", type=int, default=8, help="experts of each block (default %(default)s)")
    made.add_argument("--top_k", type=int, default=2, help="experts that a token visits (default %(default)s)")
    made.add_argument("--plain_gate", action="store_true", help="Mixtral's gate instead of Tanuki's normalised one")
    made.add_argument("--seed", type=int, default=0)

    tokenizer = verbs.add_parser("tokenizer", help="train a tokenizer, or report on one").add_subparsers(
        dest="what", required=True, metavar="train|report"
    )
    made = verb(tokenizer, "train", _tokenizer_train, "MeCab-bounded SentencePiece from text to tokenizer.json")
    _add(made, "input", "output", "fields")
    made.add_argument("--vocab_size", type=int, default=65_000, help="pieces (default %(default)s)")
    made.add_argument(
        "--character_coverage",
        type=float,
        default=0.9995,
        help="share of characters with a piece of their own (default %(default)s)",
    )
    made.add_argument(
        "--level",
        choices=("morpheme", "predicate", "bunsetsu", "none"),
        default="bunsetsu",
        help="what no piece may cross (default %(default)s; the paper: morpheme)",
    )
    made.add_argument("--dictionary", choices=("ipadic", "unidic"), default="ipadic", help="of MeCab (default %(default)s)")
    made.add_argument("--shares", default="", help="share of the vocabulary of each language: ja=0.65,en=0.35")
    made = verb(tokenizer, "report", _tokenizer_report, "compression, round trip, boundaries and vocabulary use of tokenizers")
    _add(made, "tokenizer", "input", "fields", "json")
    made.add_argument("--against", default="", help="other tokenizers, comma-separated: directories, tokenizer.json, .model")
    made.add_argument(
        "--level", choices=("morpheme", "predicate", "bunsetsu"), default="bunsetsu", help="units whose boundaries are watched"
    )
    made.add_argument("--picture", type=Path, help="draw compression and byte fallback there (.svg, .png)")

    data = verbs.add_parser("data", help="make a token store, or look into one").add_subparsers(
        dest="what", required=True, metavar="prepare|inspect"
    )
    made = verb(data, "prepare", _data_prepare, "from text, dialogues, pairs or tokens to a token store; resumable")
    _add(made, "input", "tokenizer", "output", "fields")
    made.add_argument("--skip_bad", action="store_true", help="leave out bad rows, and count and list them")
    made.add_argument("--workers", type=int, default=0, help="processes; 0 = as many as are of use (default)")
    made.add_argument(
        "--shard_characters", type=int, default=100_000_000, help="text of a shard, what a kill loses (default %(default)s)"
    )
    made.add_argument(
        "--executor", choices=("local", "ray", "slurm"), default="local", help="where workers run; ray and slurm: docs/data.md"
    )
    made.add_argument("--slurm", default="", help="options of the jobs, comma-separated: partition=cpu,time=24:00:00,...")
    made.epilog = "Killed, the same command goes on from the last finished shard; the result has the same bytes."
    made = verb(data, "inspect", _data_inspect, "what a token store holds")
    made.add_argument("--data", type=Path, required=True, help="directory of the token store")
    _add(made, "tokenizer", "json")
    made.add_argument("--rows", type=int, default=3, help="documents or rows shown (default %(default)s)")
    made.add_argument("--seq_len", type=int, default=0, help="show rows of so many tokens, as a stage packs them")

    made = verb(verbs, "score", _score, "log-probabilities of given texts")
    _add(made, "checkpoint", "input", "json")
    made = verb(verbs, "generate", _generate, "continue a text")
    _add(made, "checkpoint", "sampling", "json")
    made.add_argument("--prompt", required=True, help="the text to continue")
    made = verb(verbs, "chat", _chat, "talk to a trained model")
    _add(made, "checkpoint", "sampling")
    return parser


def _add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Flags that mean the same everywhere."""
    for name in names:
        if name == "input":
            parser.add_argument(
                "--input", required=True, help="comma-separated globs of .txt, .jsonl[.gz|.zst], .parquet, ... (docs/data.md)"
            )
        elif name == "fields":
            parser.add_argument("--text_field", default="text", help="field with the text, a.b if nested (default %(default)s)")
            parser.add_argument("--language_field", default="", help="field with the language tag, meta.lang for example")
        elif name == "output":
            parser.add_argument("--output", type=Path, required=True, help="directory to write; it must not be there yet")
        elif name == "checkpoint":
            parser.add_argument(
                "--checkpoint", type=Path, required=True, help="a stage's directory (its newest step) or one step's"
            )
        elif name == "tokenizer":
            parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
        elif name == "json":
            parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
        elif name == "sampling":
            parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default %(default)s)")
            parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest token (default)")
            parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability that is sampled from")
            parser.add_argument("--seed", type=int, default=0)


def _use_huge_pages() -> None:
    """Starts this process again with malloc on huge pages (Linux): XLA's large CPU buffers then cost far fewer page faults.

    Measured by benchmarks/cpu_step.py.  Set TANUKI_HUGE_PAGES=0 to leave malloc alone.
    """
    wanted = os.environ.get("TANUKI_HUGE_PAGES", "1") != "0" and "GLIBC_TUNABLES" not in os.environ
    if wanted and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, "-m", "tanuki_jax.cli", *sys.argv[1:]])


def _hush() -> None:
    """Keeps libraries' own reports of an error off the screen: what matters of it is raised, and becomes one message."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable


def _unraisable(found: Any) -> None:
    if "Event loop is closed" not in str(found.exc_value):  # Orbax's threads, when a save or restore has failed
        sys.__unraisablehook__(found)


def _fresh(output: Path) -> Path:
    if output.exists():
        raise UserError(f"--output: {output} is there already; name a new directory or remove it")
    return output


def _run(options: argparse.Namespace) -> None:
    from tanuki_jax import config, recipe

    loaded = config.load(options.config_flags)
    recipe.run(loaded, options.workdir, getattr(options, "stage", ""), options.allow_data_change)
    print(f"report: {options.workdir / 'report.html'}")
    last = options.workdir / "stages" / (getattr(options, "stage", "") or list(loaded.stages)[-1])
    print(f"chat:   tanuki chat --checkpoint={last}")


def _plan(options: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for a slice must not wait for the devices of this machine
    from tanuki_jax import config, plan

    recipe, topology = config.load(options.config_flags), plan.parse(options.topology)
    if options.stage and options.stage not in recipe.stages:
        raise UserError(f"--stage: the recipe has no stage {options.stage!r}; it has {', '.join(recipe.stages)}")
    if options.explain_sharding:
        print(plan.explain(recipe, options.stage, topology))
        return
    found = (plan.search if options.search else plan.plan)(recipe, options.stage, topology)
    _print(options, found, plan.table(found))
    problems = plan.problems(found)
    if problems:
        raise UserError("\n".join(problems))


def _upcycle(options: argparse.Namespace) -> None:
    import jax

    from tanuki_jax import checkpoint, config, files, model, upcycle

    _fresh(options.output)
    loaded = checkpoint.load(options.checkpoint)
    cfg = upcycle.mixture_of(
        loaded.cfg, n_experts=options.n_experts, top_k=options.top_k, normalized_gate=not options.plain_gate
    )
    settings = config.Upcycle(options.strategy, noise_std=options.noise_std, router_std=options.router_std)
    params = upcycle.upcycle(loaded.params, cfg, settings, jax.random.key(options.seed))
    with files.atomic_path(options.output) as temporary:
        checkpoint.save_params(temporary, params, {**loaded.meta, "model": config.to_dict(cfg), "data_fingerprint": ""})
        if loaded.tokenizer_directory.is_dir():
            files.copy_directory(loaded.tokenizer_directory, temporary / "tokenizer")
    before, (total, active) = model.count_parameters(loaded.cfg)[0], model.count_parameters(cfg)
    print(
        f"{options.output}: {before:,} -> {total:,} parameters ({active:,} active), {options.strategy}, "
        f"{cfg.n_experts} experts, top-{cfg.top_k}, seed {options.seed}"
    )


def _fields(options: argparse.Namespace) -> Any:
    from tanuki_jax.data.sources import Fields

    return Fields(options.text_field, options.language_field)


def _tokenizer_train(options: argparse.Namespace) -> None:
    from tanuki_jax import files
    from tanuki_jax.data import prepare, sources
    from tokenization.train import train

    shares = _shares(options.shares)
    with files.atomic_path(_fresh(options.output)) as temporary:
        rows = sources.read_rows(options.input, _fields(options))
        texts = ((row.language, prepare.text_of(row)) for row in rows)
        trained = train(
            texts, temporary, options.vocab_size, options.character_coverage, options.level, options.dictionary, shares
        )
    print(f"{options.output}: {trained}")
    if trained.pieces < options.vocab_size:
        print(f"the text has too few distinct units for {options.vocab_size:,} pieces", file=sys.stderr)


def _shares(text: str) -> dict[str, float]:
    try:
        return {name: float(share) for name, share in (part.split("=") for part in filter(None, text.split(",")))}
    except ValueError as error:
        raise UserError(f"--shares: {text!r} must be like ja=0.65,en=0.35") from error


def _tokenizer_report(options: argparse.Namespace) -> None:
    from tanuki_jax.data import prepare, sources
    from tokenization import report

    paths = [options.tokenizer, *map(Path, filter(None, options.against.split(",")))]
    domains = {
        pattern: (prepare.text_of(row) for row in sources.read_rows(pattern, _fields(options)))
        for pattern in filter(None, options.input.split(","))
    }
    found = report.report([report.open_encoder(path) for path in paths], domains, options.level)
    if options.picture:
        report.picture(found, options.picture)
    _print(options, found, report.table(found))


def _data_prepare(options: argparse.Namespace) -> None:
    from tanuki_jax.data import prepare
    from tanuki_jax.data.tokenizer import Tokenizer

    tokenizer, output = Tokenizer(options.tokenizer), _fresh(options.output)
    how = prepare.Options(_fields(options), options.skip_bad, options.shard_characters)
    manifest: prepare.Manifest | None
    if options.executor == "local":
        manifest = prepare.prepare(options.input, tokenizer, output, how, options.workers)
    else:
        from tanuki_jax.data import cluster

        manifest = cluster.prepare(options.input, tokenizer, output, how, options.workers or 2, options.executor, options.slurm)
    if manifest:
        print(f"{options.output}: {manifest}")


def _data_inspect(options: argparse.Namespace) -> None:
    from tanuki_jax.data.inspect import inspect
    from tanuki_jax.data.tokenizer import Tokenizer

    found = inspect(options.data, Tokenizer(options.tokenizer), options.rows, options.seq_len)
    _print(options, found, found["text"])


def _score(options: argparse.Namespace) -> None:
    from tanuki_jax import checkpoint
    from tanuki_jax.data import sources
    from tanuki_jax.data.tokenizer import Tokenizer
    from tanuki_jax.evaluate.score import score_rows

    rows = [row.fields for row in sources.read_rows(options.input)]
    loaded = checkpoint.load(options.checkpoint)
    scored = score_rows(loaded.cfg, loaded.params, Tokenizer(loaded.tokenizer_directory), rows)
    total, tokens = sum(r["logprob"] for r in scored), sum(r["tokens"] for r in scored)
    lines = [f"{r['logprob']:14.4f} {r['tokens']:8d}" for r in scored]
    _print(
        options,
        {"rows": scored},
        "\n".join([f"{'logprob':>14s} {'tokens':>8s}", *lines, f"{total:14.4f} {tokens:8d}  total"]),
    )


def _sampling(options: argparse.Namespace, stop: int) -> Any:
    from tanuki_jax.model import Sampling

    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError("--max_new_tokens must be at least 1, --temperature at least 0, --top_p above 0 and at most 1")
    return Sampling(options.max_new_tokens, options.temperature, options.top_p, (stop,))


def _generate(options: argparse.Namespace) -> None:
    from tanuki_jax import checkpoint, model
    from tanuki_jax.data.tokenizer import Tokenizer

    loaded = checkpoint.load(options.checkpoint)
    tokenizer = Tokenizer(loaded.tokenizer_directory)
    prompt = tokenizer.encode(options.prompt) or [tokenizer.bos]
    [ids] = model.generate(loaded.cfg, loaded.params, [prompt], _sampling(options, tokenizer.eos), options.seed)
    text = tokenizer.decode(ids)
    _print(options, {"prompt": options.prompt, "text": text, "tokens": len(ids)}, options.prompt + text)


def _chat(options: argparse.Namespace) -> None:
    from tanuki_jax import checkpoint
    from tanuki_jax.data.tokenizer import Tokenizer
    from tanuki_jax.serve.chat import chat

    loaded = checkpoint.load(options.checkpoint)
    tokenizer = Tokenizer(loaded.tokenizer_directory)
    chat(loaded.cfg, loaded.params, tokenizer, _sampling(options, tokenizer.eos), options.seed)


def _print(options: argparse.Namespace, document: Any, text: str) -> None:
    print(json.dumps(document, ensure_ascii=False) if options.json else text)


if __name__ == "__main__":
    sys.exit(main())
