"""How good a tokenizer is on given text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tokenization.segment import Segmenter


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Compression, losslessness and vocabulary use over lines of text.

    characters_per_token and bytes_per_token: higher is better.  fertility: tokens per MeCab morpheme.  byte_fallback: share of
    tokens that spell a byte.  round_trip: share of lines that come back exactly; special: tokens that text must not give.
    """
    segmenter = Segmenter()
    characters = size = tokens = units = fallback = lines = exact = special = 0
    used: set[int] = set()
    spelt = {i for i in range(tokenizer.vocab_size) if is_byte(tokenizer.piece(i))}
    controls = set(tokenizer.special.values())
    for text in texts:
        for line in text.splitlines(keepends=True):
            ids = tokenizer.encode(line)
            lines += 1
            exact += tokenizer.decode(ids) == line
            characters, size, tokens = characters + len(line), size + len(line.encode()), tokens + len(ids)
            units += len(segmenter.units(line.rstrip("\n")))
            fallback += sum(i in spelt for i in ids)
            special += sum(i in controls for i in ids)
            used.update(ids)
    if not lines:
        raise UserError("tokenizer report: the input has no text")
    return {
        "lines": lines,
        "characters": characters,
        "tokens": tokens,
        "characters_per_token": round(characters / tokens, 4),
        "bytes_per_token": round(size / tokens, 4),
        "fertility": round(tokens / max(units, 1), 4),
        "byte_fallback": round(fallback / tokens, 6),
        "round_trip": exact / lines,
        "special": special,
        "vocabulary": tokenizer.vocab_size,
        "vocabulary_used": len(used),
    }


def is_byte(piece: str) -> bool:
    """Whether a piece stands for one byte, <0x41> say."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
