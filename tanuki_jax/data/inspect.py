"""What a token store holds, for people: counts, lengths, and documents with their segments of loss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tanuki_jax.data.prepare import open_store
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError

BINS = 10


def inspect(directory: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Manifest, histogram of document lengths, and the first documents decoded; what is trained on is marked.

    Returns a dict with the numbers and, under `text`, the same as lines for a terminal.
    """
    manifest, tokens, mask = open_store(directory)
    if manifest.tokenizer not in ("", tokenizer.fingerprint):
        raise UserError(
            f"data: {directory} was made with another tokenizer ({manifest.tokenizer}, this one is {tokenizer.fingerprint})"
        )
    counts, edges = np.histogram(tokens.lengths, bins=min(BINS, max(1, int(tokens.lengths.max(initial=1)))))
    lines = [
        f"{manifest.rows:,} {manifest.kind} rows, {manifest.documents:,} documents, {manifest.tokens:,} tokens "
        f"({tokens.dtype.name}), {manifest.characters / max(manifest.tokens, 1):.3f} characters a token",
        "tokens per document:",
        *(
            f"  {a:8.0f} to {b:8.0f}  {n:8,}  {'█' * round(40 * n / max(1, counts.max()))}"
            for n, a, b in zip(counts, edges, edges[1:], strict=False)
        ),
    ]
    shown: list[dict[str, Any]] = []
    for i in range(min(rows, manifest.documents)):
        ids = tokens.document(i).tolist()
        weights = mask.document(i).tolist() if mask else [1] * len(ids)
        shown.append({"tokens": len(ids), "parts": _parts(tokenizer, ids, weights)})
        lines.append(f"document {i}, {len(ids)} tokens:\n{''.join(_coloured(part) for part in shown[-1]['parts'])}")
    return {
        "rows": manifest.rows,
        "kind": manifest.kind,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "shown": shown,
        "text": "\n".join(lines),
    }


def _parts(tokenizer: Tokenizer, ids: list[int], weights: list[int]) -> list[dict[str, Any]]:
    """Runs of tokens with the same weight, decoded."""
    cuts = [0, *(i for i in range(1, len(ids)) if weights[i] != weights[i - 1]), len(ids)]
    return [
        {"trained": bool(weights[a]), "text": tokenizer.decode(ids[a:b])} for a, b in zip(cuts, cuts[1:], strict=False) if b > a
    ]


def _coloured(part: dict[str, Any]) -> str:
    if not sys.stdout.isatty():
        return f"[{part['text']}]" if part["trained"] else part["text"]
    return f"\033[32m{part['text']}\033[0m" if part["trained"] else f"\033[2m{part['text']}\033[0m"
