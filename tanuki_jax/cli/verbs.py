"""The verbs: each calls one function of a package and prints.  Heavy imports happen inside the functions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tanuki_jax.cli import jax_platform
from tanuki_jax.config.schema import MOE_KEYS, Tokenizer, range_of
from tanuki_jax.errors import UserError

if TYPE_CHECKING:
    from tanuki_jax.config.synthesis import Endpoint
    from tanuki_jax.data import tokenizer as data_tokenizer
    from tanuki_jax.data.sources import Fields
    from tanuki_jax.model import Sampling


def _new_output(output: Path) -> Path:
    """The output whose lock is held: it must not be there; the remains of a killed command are removed."""
    from tanuki_jax import files

    if output.exists():
        raise UserError(f"--output: {output} is there already; name a new directory or remove it")
    files.remove_unfinished(output)
    return output


def _run(options: argparse.Namespace) -> None:
    from tanuki_jax import config
    from tanuki_jax.recipe.run import run_recipe

    loaded = config.load(options.config_flags)
    run_recipe(loaded, options.workdir, getattr(options, "stage", ""), options.allow_data_change)
    print(f"report: {shlex.quote(str((options.workdir / 'report.html').absolute()))}")
    finished = [options.stage] if getattr(options, "stage", "") else list(loaded.stages)
    for last in [name for name in finished if not config.STAGE_KINDS[loaded.stages[name].kind].makes_rows][-1:]:
        directory = (options.workdir / "stages" / last).absolute()
        print(f"chat:   {jax_platform.program()} chat --checkpoint={shlex.quote(str(directory))}")


def _plan(options: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for a slice must not wait for the devices of this machine
    from tanuki_jax import config, plan

    recipe, topology = config.load(options.config_flags), plan.parse(options.topology)
    if options.stage and options.stage not in recipe.stages:
        raise UserError(f"--stage: the recipe has no stage {options.stage!r}; it has {', '.join(recipe.stages)}")
    if options.explain_sharding:
        print(plan.explain(recipe, options.stage, topology))
        return
    result = (plan.search if options.search else plan.plan)(recipe, options.stage, topology)
    _print(options, result, plan.table(result))
    problems = plan.problems(result)
    if problems:
        raise UserError("\ntanuki: ".join(problems))


def _prefetch_weights(directory: Path) -> None:
    """Has the weights of a directory read while libraries are imported: Hugging Face's, or the newest step's."""
    from tanuki_jax import files

    with contextlib.suppress(OSError):
        steps = [*directory.glob("checkpoints/*/params"), *directory.glob("params")]
        newest = max(steps, key=lambda path: path.stat().st_mtime, default=None)
        ours = [path for path in newest.parent.rglob("*") if "optimizer" not in path.parts] if newest else []
        files.advise_willneed([path for path in (*directory.glob("*.safetensors"), *ours) if path.is_file()])


def _upcycle(options: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # from file to file: an accelerator would only be in the way
    for path in () if options.dry_run else options.checkpoint.split(","):
        _prefetch_weights(Path(path))
    from tanuki_jax.upcycle import stream

    shape = {name: getattr(options, name) for name in ("n_experts", *MOE_KEYS)}
    settings = {n: getattr(options, n) for n in ("strategy", "noise_std", "drop_ratio", "router_init", "router_std")}
    job = stream.plan(options.checkpoint.split(","), shape, settings, options.seed, options.param_dtype)
    if options.dry_run:
        print(stream.format_prediction(job, options.output))
        return
    print(stream.run(job, _new_output(options.output)))


def _import(options: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    _prefetch_weights(options.hf)
    from tanuki_jax import interop

    if options.vocab_size and (interop.is_peft(options.hf) or options.base):
        raise UserError("--vocab_size: adapters have no vocabulary; set it where their base is imported")
    if options.param_dtype and (interop.is_peft(options.hf) or options.base):
        raise UserError("--param_dtype: adapters become float32, which holds every value of theirs")
    if interop.is_peft(options.hf):
        if not options.base:
            raise UserError("import: adapters need --base, the checkpoint of ours that they lie on")
        print(interop.import_adapters(options.hf, options.base, _new_output(options.output)))
    else:
        print(interop.import_huggingface(options.hf, _new_output(options.output), options.vocab_size, options.param_dtype))


def _export(options: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    _prefetch_weights(options.checkpoint)
    from tanuki_jax import interop

    if options.format == "peft" and options.vocab_size:
        raise UserError("--vocab_size: adapters have no vocabulary; set it where their base is exported")
    if options.format == "peft" and options.param_dtype:
        raise UserError("--param_dtype: adapters are float32; it is for --format=hf")
    if options.format == "peft":
        print(interop.export_adapters(options.checkpoint, _new_output(options.output), options.base_name))
    else:
        print(
            interop.export_huggingface(options.checkpoint, _new_output(options.output), options.vocab_size, options.param_dtype)
        )


def _fields(options: argparse.Namespace) -> Fields:
    from tanuki_jax.data.sources import Fields

    return Fields(options.text_field, options.language_field, options.row_format)


def _tokenizer_train(options: argparse.Namespace) -> None:
    from tanuki_jax import files
    from tanuki_jax.data import prepare, sources
    from tanuki_jax.recipe.train_tokenizer import HOOKS, user_errors
    from tokenization.options import TrainOptions
    from tokenization.train import train
    from tokenization.vocab_size import check_vocab_size

    train_options = TrainOptions(
        vocab_size=options.vocab_size,
        character_coverage=options.character_coverage,
        boundary=options.boundary,
        dictionary=options.dictionary,
        language_weights=_parse_language_weights(options.language_weights),
    )

    def texts() -> Iterator[tuple[str, str]]:
        return ((row.language, prepare.text_of(row)) for row in sources.read_rows(options.input, _fields(options)))

    with user_errors(), files.atomic_path(_new_output(options.output)) as temporary:
        check_vocab_size(texts(), train_options, HOOKS)
        trained = train(texts(), temporary, train_options, HOOKS)
    print(f"{options.output}: {trained}")
    if trained.pieces < options.vocab_size:
        print(f"the text has too few distinct units for {options.vocab_size:,} pieces; it gave all it has", file=sys.stderr)


def _parse_language_weights(text: str) -> dict[str, float]:
    allowed, weights = range_of(Tokenizer, "language_weights"), {}
    for part in filter(None, text.split(",")):
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError as error:
            raise UserError(f"--language_weights: {text!r} must be like ja=0.65,en=0.35") from error
        if name in weights or value not in allowed:
            reason = "it is there twice" if name in weights else f"it must be {allowed.describe()}"
            raise UserError(f"--language_weights: {part!r} of {text!r}: {reason}")
        weights[name] = value
    return weights


def _tokenizer_report(options: argparse.Namespace) -> None:
    from tanuki_jax import files
    from tanuki_jax.data import prepare, sources
    from tanuki_jax.data.tokenizer import Tokenizer
    from tanuki_jax.recipe.train_tokenizer import user_errors
    from tokenization import report
    from tokenization.encoders import open_encoder

    paths = [options.tokenizer, *map(Path, filter(None, options.compare.split(",")))]
    domains = {
        pattern: (prepare.text_of(row) for row in sources.read_rows(pattern, _fields(options)))
        for pattern in sources.split_patterns(options.input)
    }
    with user_errors():
        figures = report.report([open_encoder(path, Tokenizer) for path in paths], domains, options.boundary)
        if options.plot:
            file_format = report.plot_format(options.plot)
            with files.atomic_path(options.plot) as temporary:
                report.plot(figures, temporary, file_format)
    _print(options, figures, report.table(figures))


def _data_prepare(options: argparse.Namespace) -> None:
    from tanuki_jax.data import prepare
    from tanuki_jax.data.tokenizer import Tokenizer

    tokenizer, output = Tokenizer(options.tokenizer), _new_output(options.output)
    prepare_options = prepare.Options(_fields(options), options.skip_invalid, options.shard_characters)
    manifest: prepare.Manifest | None
    if options.executor == "local":
        manifest = prepare.prepare(options.input, tokenizer, output, prepare_options, options.workers)
    else:
        from tanuki_jax.data import cluster

        manifest = cluster.prepare(
            options.input,
            tokenizer,
            output,
            prepare_options,
            options.workers or 2,
            options.executor,
            options.slurm,
        )
    if manifest:
        print(f"{options.output}: {manifest}")


def _data_inspect(options: argparse.Namespace) -> None:
    from tanuki_jax.data.inspect import inspect
    from tanuki_jax.data.tokenizer import Tokenizer

    document = inspect(options.data, Tokenizer(options.tokenizer), options.rows, options.seq_len)
    _print(options, document, document["text"])


def _data_filter(options: argparse.Namespace) -> None:
    from tanuki_jax.config.synthesis import Filters
    from tanuki_jax.data.filters import filter_files

    names = Filters.__dataclass_fields__
    filters = Filters(**{name: getattr(options, name) for name in names})
    if options.judge and not (filters.min_quality or filters.dependent_turns):
        raise UserError("--judge is for --min_quality and --dependent_turns; give one of them, or leave it out")
    summary = filter_files(
        options.input,
        filters,
        _new_output(options.output),
        against=options.against,
        fields=_fields(options),
        skip_invalid=options.skip_invalid,
        judge=_judge(options),
    )
    _print(options, summary.as_json(), f"{summary}\n{options.output}: rows.jsonl, dropped.jsonl, summary.json")


def _data_audit(options: argparse.Namespace) -> None:
    from tanuki_jax.data import audit

    opened = audit.open_audit(
        options.input,
        options.output,
        options.sample,
        options.seed,
        audit.read_categories(options.categories),
        _fields(options),
    )
    if judge := _judge(options):
        audit.label_by_judge(opened, judge)
    elif options.page_only:
        audit.write_page(opened)
        print(f"label the rows on {opened.directory / 'page.html'}, then put its labels.jsonl beside it", file=sys.stderr)
    else:
        audit.serve(opened, options.port)
    result = opened.finish()
    _print(options, result, audit.table(result["shares"], result["sample"]))


def _judge(options: argparse.Namespace) -> Endpoint | None:
    """The endpoint of --judge."""
    from tanuki_jax.config.addresses import check_base_url
    from tanuki_jax.config.synthesis import Endpoint

    if not options.judge:
        return None
    check_base_url("--judge", options.judge, "--judge_api_key_env")
    return Endpoint(base_url=options.judge, model=options.judge_model, api_key_env=options.judge_api_key_env)


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


def _sampling(options: argparse.Namespace, tokenizer: data_tokenizer.Tokenizer) -> Sampling:
    from tanuki_jax.data.chat import stop_ids
    from tanuki_jax.model import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return Sampling(stop=stop_ids(tokenizer), **{name: getattr(options, name) for name in names})


def _generate(options: argparse.Namespace) -> None:
    from tanuki_jax import checkpoint, model
    from tanuki_jax.data.tokenizer import Tokenizer

    loaded = checkpoint.load(options.checkpoint)
    tokenizer = Tokenizer(loaded.tokenizer_directory)
    prompt = tokenizer.encode_prompt(options.prompt) or [tokenizer.eos if tokenizer.bos is None else tokenizer.bos]
    [ids] = model.generate(loaded.cfg, loaded.params, [prompt], _sampling(options, tokenizer), options.seed)
    text = tokenizer.decode_after(prompt, ids)
    _print(options, {"prompt": options.prompt, "text": text, "tokens": len(ids)}, options.prompt + text)


def _chat(options: argparse.Namespace) -> None:
    from tanuki_jax import checkpoint, model
    from tanuki_jax.cli.chat import ChatModel, chat, stored_questions
    from tanuki_jax.data.tokenizer import Tokenizer

    loaded = checkpoint.load(options.checkpoint)
    tokenizer = Tokenizer(loaded.tokenizer_directory)
    newest = checkpoint.locate(options.checkpoint) == checkpoint.locate(loaded.stage_directory)
    chat(
        ChatModel(loaded.cfg, model.slots.unstack(loaded.cfg, loaded.params), tokenizer, checkpoint.max_seq_len(loaded.meta)),
        _sampling(options, tokenizer),
        options.seed,
        questions=stored_questions(loaded.stage_directory) if newest else (),  # they were answered by the newest step
    )


def _serve(options: argparse.Namespace) -> None:
    from tanuki_jax import serve

    names = ("slots", "max_length", "queue", "grace", "model_name")
    settings = serve.Options(**{name: getattr(options, name) for name in names}, keys=_read_keys(options.api_key_env))
    serve.serve(options.checkpoint, options.host, options.port, settings, options.tensor)


def _read_keys(variable: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()) if variable else ()
    if variable and not keys:
        raise UserError(
            f"--api_key_env: the environment variable {variable} is empty; it holds the key, or several with commas"
        )
    return keys


def _synth(options: argparse.Namespace) -> None:
    from tanuki_jax import config
    from tanuki_jax.synth import make

    recipe = config.load(options.config_flags, needs_stages=False)
    summaries = make.make_all(recipe, options.workdir / "synth", options.name, options.dry_run)
    _print(options, {"synth": [summary.report for summary in summaries]}, "\n\n".join(summary.text for summary in summaries))


def _launch(options: argparse.Namespace) -> None:
    from tanuki_jax import launch

    prefix = "setting_"
    flags = [
        f"--{key.removeprefix(prefix)}={value}"
        for key, values in vars(options).items()
        if key.startswith(prefix)
        for value in values or ()
    ]
    launch.launch(options.platform, options.action, options.settings, [*flags, *options.config_flags], options.dry_run)


def _print(options: argparse.Namespace, document: object, text: str) -> None:
    print(json.dumps(document, ensure_ascii=False) if options.json else text)


WORK: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": _run,
    "plan": _plan,
    "upcycle": _upcycle,
    "import": _import,
    "export": _export,
    "tokenizer_train": _tokenizer_train,
    "tokenizer_report": _tokenizer_report,
    "data_prepare": _data_prepare,
    "data_inspect": _data_inspect,
    "data_filter": _data_filter,
    "data_audit": _data_audit,
    "score": _score,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "synth": _synth,
    "launch": _launch,
}
