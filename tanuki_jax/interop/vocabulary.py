"""Padding of a vocabulary: rows of the embedding and columns of the head that belong to no piece, to make V divide evenly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tokenizers

from tanuki_jax.checkpoint import LazyArray, LazyCheckpoint
from tanuki_jax.errors import UserError


def source_vocab_size(directory: Path) -> int:
    """Rows that the ids of a directory's tokenizer need; 0 where there is none."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return 0
    try:
        return 1 + max(tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file} cannot be read: {error}; is the download whole?") from error


def check_rows(path: Path, rows: int) -> None:
    """An error where the tokenizer of a published model gives ids for which its embedding has no row."""
    needed = source_vocab_size(path)
    if needed > rows:
        raise UserError(
            f"{path}: its tokenizer has ids up to {needed - 1:,}, {needed:,} pieces, and the model {rows:,} rows; "
            f"--vocab_size={-(-needed // 128) * 128} adds rows of zeros, to be trained"
        )


def resize(opened: LazyCheckpoint, vocab_size: int, verb: str) -> tuple[LazyCheckpoint, str]:
    """The checkpoint with `vocab_size` rows, cut or padded with zeros, and how exact that is; as it is where that is 0.

    Neither is quite exact: an id that is cut off had a probability, and one that is added has a logit of 0.
    """
    old = opened.cfg.vocab_size
    if vocab_size in (0, old):
        return opened, "exact"
    directory = opened.tokenizer_directory
    pieces = source_vocab_size(directory)
    if vocab_size < max(1, pieces):
        raise UserError(f"{verb}: --vocab_size {vocab_size} is less than the {pieces:,} pieces of the tokenizer in {directory}")

    def resized(name: str, axis: int) -> LazyArray:
        whole = opened.tree[name]
        shape = tuple(vocab_size if i == axis else n for i, n in enumerate(whole.shape))

        def read() -> np.ndarray:
            array = whole.read()[:vocab_size] if axis == 0 else whole.read()[:, :vocab_size]
            return np.pad(array, [(0, n - m) for n, m in zip(shape, array.shape, strict=True)])

        return LazyArray(shape, whole.dtype, read)

    tree = opened.tree | {"embed/table": resized("embed/table", 0), "head": resized("head", 1)}
    change = f"vocabulary cut from {old:,} to {vocab_size:,}" if vocab_size < old else f"padded from {old:,} to {vocab_size:,}"
    cfg = dataclasses.replace(opened.cfg, vocab_size=vocab_size)
    return dataclasses.replace(opened, cfg=cfg, tree=tree), f"exact but for the {change}"
