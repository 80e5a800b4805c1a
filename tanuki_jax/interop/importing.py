"""Hugging Face directories as checkpoints of ours; streamed, exact unless a cast is asked for, whole or not at all."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tanuki_jax import checkpoint, config, files, model
from tanuki_jax.data.chat import stop_ids
from tanuki_jax.data.tokenizer import Tokenizer, copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.interop.huggingface import open_huggingface
from tanuki_jax.interop.vocabulary import check_rows, resize
from tanuki_jax.progress import Progress

SLOW = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")  # what other libraries read: "slow" tokenizers
BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}  # of a number's precision
SHOWN = ("vocab_size", "n_layers", "d_model", "rope_theta")  # keys of the model that the config's lines name


def import_huggingface(path: Path, output: Path, vocab_size: int = 0, param_dtype: str = "") -> str:
    """Writes a Llama, Mistral, Mixtral or Tanuki directory as step 0 of a stage.

    Returns what it is, and the lines of a config that begins with it; notes on its tokenizer go to stderr.
    """
    published = open_huggingface(path, param_dtype) if param_dtype else open_huggingface(path)
    opened, exact = resize(published, vocab_size, "import")
    cfg = opened.cfg
    check_rows(path, cfg.vocab_size)
    notes = tokenizer_notes(path)
    total, active = model.count_parameters(cfg)
    progress = Progress("import", total * np.dtype(cfg.param_dtype).itemsize, "MB", 1e6)

    def blocks() -> Iterator[checkpoint.Block]:
        done = 0
        for name, stored in opened.tree.items():
            for at in checkpoint.block_indices(name, stored.shape):
                array = stored.read(*at).astype(model.parameter_dtype(cfg, name), copy=False)
                yield name, at, array
                done += array.nbytes
                progress.show(done)

    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        meta: checkpoint.Meta = {
            **opened.meta,
            "stage": "import",
            "model": config.to_dict(cfg),
            "data_fingerprint": "",
            "id": uuid.uuid4().hex,
        }
        checkpoint.save_streaming(temporary, cfg, blocks(), meta)
        copy_tokenizer(path, temporary / "tokenizer")
    for note in notes:
        print(f"import: {note}", file=sys.stderr)
    counts = f"{total:,} parameters" + (f", {active:,} active" if active != total else "")
    changes = [describe_cast(opened.meta["cast"], cfg.param_dtype)] if "cast" in opened.meta else []
    if not changes or exact != "exact":
        changes.append(exact)
    lines = _config_lines(output, cfg, checkpoint.max_seq_len(meta))
    return f"{output}: {counts}, {cfg.param_dtype}, {', '.join(changes)}\n{lines}"


def describe_cast(dtypes: list[str], target: str) -> str:
    """What a cast did to the numbers."""
    cast = f"cast from {' and '.join(dtypes)} to {target}"
    rounded = [dtype for dtype in dtypes if BITS[dtype] > BITS[target]]
    if not rounded:
        return f"{cast}, which holds every value"
    lost = ", ".join(f"{target} has {BITS[dtype] - BITS[target]} bits of mantissa fewer than {dtype}" for dtype in rounded)
    return f"{cast}, no longer exact: {lost}"


def tokenizer_notes(path: Path) -> list[str]:
    """What users must know about the tokenizer in a published model's directory."""
    if (path / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer(path)
            if tokenizer.chat_template:
                stop_ids(tokenizer)  # which renders a few conversations
                return []
        except UserError as error:
            return [f"the tokenizer cannot be used as it is: {error}"]
        return [
            "the tokenizer has no chat template, which sft, dpo and chat need; "
            f"write one to {path}/chat_template.jinja and import again"
        ]
    if slow := next((name for name in SLOW if (path / name).is_file()), None):
        fix = f"""python -c "import transformers as t; t.AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')" """
        return [
            f"{path} has {slow} and no tokenizer.json, so this checkpoint has no tokenizer; run {fix.strip()} and import again"
        ]
    return [
        f"{path} has no tokenizer, so this checkpoint has none, and text cannot be read or made with it; "
        "put its tokenizer.json and tokenizer_config.json there and import again"
    ]


def _config_lines(output: Path, cfg: config.ModelConfig, longest: int) -> str:
    """The lines of a config that a stage from this checkpoint needs."""
    shape = ", ".join(f"{name} {getattr(cfg, name)}" for name in SHOWN)
    directory = files.absolute(output)
    has_tokenizer = (directory / "tokenizer" / "tokenizer.json").is_file()
    tokenizer = [] if has_tokenizer else ['c.tokenizer.path = "DIRECTORY WITH tokenizer.json"  # this checkpoint has none']
    sections = "c.model and c.tokenizer" if has_tokenizer else "c.model"
    return "\n".join(
        [
            f"in a config, where what is left out of {sections} is this checkpoint's ({shape}, ...):",
            'c.data = dict(chats="chats.jsonl")',
            *tokenizer,
            "c.stages.sft = config.stage(",
            f'    "sft", init_from={str(directory)!r}, mixture=dict(chats=(1.0,)),',
            f"    seq_len={min(longest, 2048)}, batch_size=8, epochs=1.0,",
            ")",
        ]
    )
