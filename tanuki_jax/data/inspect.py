"""Shows what a token store holds: counts, lengths, and samples that show which tokens are trained, and their segments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from tanuki_jax.data import layouts, packing
from tanuki_jax.data.layouts import Example, Rows
from tanuki_jax.data.prepare import Manifest, open_store
from tanuki_jax.data.store import Store
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError

BINS = 10
MAX_SHOWN = 1000  # tokens of a document or row that are shown at most
COLOURS = (32, 36, 33, 35, 34)  # of segments, in turn


class Part(TypedDict):
    """Neighbouring tokens of one segment, all trained or none."""

    trained: bool
    segment: int
    text: str


def inspect(directory: Path, tokenizer: Tokenizer, rows: int, seq_len: int = 0) -> dict[str, Any]:
    """Manifest, histogram of document lengths, and decoded samples: documents, or with `seq_len` rows as a stage packs them.

    Returns a dict with the numbers and, under `text`, the same as lines for a terminal.  There each segment has a colour
    and untrained text is dim; elsewhere a segment begins with its number and trained text is in brackets.
    """
    if rows < 0 or seq_len < 0:
        raise UserError("data: --rows and --seq_len must be at least 0")
    manifest, tokens, mask = open_store(directory)
    if manifest.tokenizer not in ("", tokenizer.fingerprint):
        raise UserError(
            f"data: {directory} was made with another tokenizer ({manifest.tokenizer}, this one is {tokenizer.fingerprint})"
        )
    lengths = tokens.lengths
    counts, edges = np.histogram(lengths, bins=min(BINS, max(1, int(lengths.max(initial=1)))))
    lines = [
        f"{manifest}, {manifest.documents:,} documents of {lengths.mean():,.0f} tokens on average, {tokens.dtype.name}",
        "tokens per document:",
        *(
            f"  {a:8.0f} to {b:8.0f}  {n:8,}  {'█' * round(40 * n / max(1, counts.max()))}"
            for n, a, b in zip(counts, edges, edges[1:], strict=False)
        ),
    ]
    result: dict[str, Any] = {
        "rows": manifest.rows,
        "kind": manifest.kind,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "rejected": manifest.rejected,
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }
    if seq_len:
        packed, padding, description = _rows(manifest, tokens, mask, seq_len, tokenizer.vocab_size, Path(directory).name)
        lines.append(description)
        result |= {"packed_rows": len(packed), "padding": round(padding, 4), "packed": description}
        samples = [("row", i, packed[i]) for i in range(min(rows, len(packed)))]
    else:
        samples = [("document", i, _document(tokens, mask, i)) for i in range(min(rows, manifest.documents))]
    result["shown"] = []
    for noun, i, sample in samples:
        parts = _parts(tokenizer, sample)
        used = int((sample["segment_ids"] > 0).sum())
        result["shown"].append({"tokens": used, "parts": parts})
        more = f" (the first {MAX_SHOWN})" if used > MAX_SHOWN else ""
        lines.append(f"{noun} {i}, {used} tokens{more}:\n{''.join(_draw(part, bool(seq_len)) for part in parts)}")
    return {**result, "text": "\n".join(lines)}


def _rows(
    manifest: Manifest, tokens: Store, mask: Store | None, seq_len: int, vocab_size: int, source: str
) -> tuple[Rows, float, str]:
    """Rows as a stage packs them, the share of padding, and the stage's description of them."""
    if mask is None:
        windows = layouts.Windows(tokens, seq_len, True, vocab_size)
        return windows, 0.0, windows.describe(source)
    pairs, lengths = manifest.kind == "pair", tokens.lengths
    packed = packing.pack(tokens, mask, seq_len, pairs)
    rows: Rows = layouts.PackedDialogues(tokens, mask, packed, seq_len)
    if pairs:
        widest = int(np.diff(packed.starts).max(initial=1))
        rows = layouts.PackedPairs(tokens, mask, packed, seq_len, widest, np.zeros((len(lengths) // 2, 2), np.float32))
    padding = packing.padding(packed, lengths, seq_len, pairs)
    return rows, padding, packing.describe_packing(packed, lengths, seq_len, pairs, source)


def _document(tokens: Store, mask: Store | None, index: int) -> Example:
    """A document in the form of a row, with `own_weights`: the weight of each token itself, not of its target."""
    ids = tokens.document(index)
    weights = mask.document(index) if mask else np.ones(len(ids))
    return {"tokens": ids, "own_weights": weights, "segment_ids": np.ones(len(ids), np.int32)}


def _parts(tokenizer: Tokenizer, row: Example) -> list[Part]:
    """Runs of tokens of one segment with the same weight, decoded; padding is left out."""
    used = min(int((row["segment_ids"] > 0).sum()), MAX_SHOWN)
    ids, segments = row["tokens"][:used].tolist(), row["segment_ids"][:used].tolist()
    if "own_weights" in row:
        weights = row["own_weights"][:used].tolist()
    else:  # a row's weight belongs to the target, the token after
        weights = [0.0, *row["loss_weights"][: max(0, used - 1)].tolist()][:used]
    cuts = [i for i in range(1, used) if (weights[i], segments[i]) != (weights[i - 1], segments[i - 1])]
    return [
        {"trained": bool(weights[a]), "segment": segments[a], "text": tokenizer.decode(ids[a:b])}
        for a, b in zip([0, *cuts], [*cuts, used], strict=True)
        if b > a
    ]


def _draw(part: Part, numbered: bool) -> str:
    if sys.stdout.isatty():
        colour = COLOURS[(part["segment"] - 1) % len(COLOURS)]
        return f"\033[{'1' if part['trained'] else '2'};{colour}m{part['text']}\033[0m"
    number = f"<{part['segment']}>" if numbered else ""
    return number + (f"[{part['text']}]" if part["trained"] else part["text"])
