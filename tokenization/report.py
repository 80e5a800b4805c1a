"""How good tokenizers are on given text: compression, losslessness, boundaries, special tokens, vocabulary use."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tanuki_jax.data.tokenizer import Tokenizer, byte_of
from tanuki_jax.errors import UserError
from tokenization.segment import Segmenter

SHOWN = 5  # examples of what is wrong
COUNTED_SAMPLE = ("tokens", "fallback", "exact", "crossing", "special", "agree")
SHARES = ("byte_fallback", "round_trip", "crossing", "agreement")
COLUMNS = {
    "characters_per_token": "chars/token",
    "bytes_per_token": "bytes/token",
    "fertility": "fertility",
    "byte_fallback": "fallback",
    "round_trip": "round trip",
    "crossing": "crossing",
    "special": "special",
    "agreement": "HF=SPM",
}


class Encoder(NamedTuple):
    """A tokenizer of any make: what the report asks of it."""

    name: str
    encode: Callable[[str], tuple[list[int], list[int]]]  # ids, and the character at which each begins
    decode: Callable[[list[int]], str]
    pieces: list[str]  # of each id, with real spaces
    special: set[int]
    sentencepiece: Any = None  # the model beside tokenizer.json, where there is one


def open_encoder(path: Path) -> Encoder:
    """A directory with tokenizer.json, a tokenizer.json (or any .json of the tokenizers library), or a SentencePiece .model."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer report: no such tokenizer: {path}")
    if path.is_dir():
        model = path / "tokenizer.model"
        ours = Tokenizer(path)
        pieces = [ours.piece(i) for i in range(ours.vocab_size)]
        loaded = _load_model(model) if model.is_file() else None
        return Encoder(path.name, ours.encode_with_offsets, ours.decode, pieces, set(ours.special.values()), loaded)
    if path.suffix == ".model":
        processor = _load_model(path)

        def encode(text: str) -> tuple[list[int], list[int]]:
            found = processor.encode(text, return_type="proto").pieces
            at = list(itertools.accumulate((len(c.encode()) for c in text), initial=0))  # byte of each character
            return [p.id for p in found], [bisect.bisect_right(at, p.begin) - 1 for p in found]

        size = processor.get_piece_size()
        special = {i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
        special |= {i for i in range(size) if _looks_special(processor.id_to_piece(i)) and not processor.is_byte(i)}
        pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(size)]
        return Encoder(path.name, encode, processor.decode, pieces, special)
    import tokenizers

    try:
        raw = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"tokenizer report: {path} cannot be read: {error}") from error

    def encode_raw(text: str) -> tuple[list[int], list[int]]:
        found = raw.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    special = {i for i, token in raw.get_added_tokens_decoder().items() if token.special}
    pieces = [raw.id_to_token(i) or "" for i in range(raw.get_vocab_size())]
    return Encoder(path.stem, encode_raw, lambda ids: raw.decode(ids, skip_special_tokens=False), pieces, special)


def _looks_special(piece: str) -> bool:
    return len(piece) > 2 and piece.startswith("<") and piece.endswith(">") and byte_of(piece) is None


def _load_model(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer report: {path} is not a SentencePiece model: {error}") from error


def report(
    encoders: Iterable[Encoder], domains: Mapping[str, Iterable[str]], boundary: str = "bunsetsu", dictionary: str = "ipadic"
) -> dict[str, Any]:
    """{"domains": {domain: {tokenizer: figures}}, "vocabulary": {tokenizer: figures}}; texts are measured line by line.

    Of a domain: characters_per_token and bytes_per_token (higher is better); fertility: tokens per MeCab morpheme;
    byte_fallback: share of tokens that spell a byte; round_trip: share of lines that come back exactly; crossing: share of
    tokens that go over a boundary of the boundary's units; special: special tokens that text gave; agreement: share of lines to
    which tokenizer.json and the SentencePiece model beside it give the same ids, with its `disagreements`.
    Of a vocabulary: pieces; japanese: pieces with kana or kanji; split_alone: share of the Japanese pieces of several
    characters that MeCab cuts when it sees them alone; used: ids that the texts used; injected: special tokens that their
    own spelling gave.
    """
    encoders, morphemes = _unique_names(encoders), Segmenter("morpheme", dictionary)
    segmenter = Segmenter(boundary, dictionary)
    used: dict[str, set[int]] = {encoder.name: set() for encoder in encoders}
    found: dict[str, Any] = {}
    for domain, texts in domains.items():
        rows = {
            encoder.name: dict.fromkeys(("tokens", "fallback", "exact", "crossing", "special", "agree"), 0)
            for encoder in encoders
        }
        wrong: dict[str, list[str]] = {encoder.name: [] for encoder in encoders}
        characters = size = words = lines = 0
        for text in texts:
            for line in text.splitlines(keepends=True):
                lines, characters, size = lines + 1, characters + len(line), size + len(line.encode())
                shown = line.replace("\0", "\ufffd")  # MeCab stops at NUL
                words += len(morphemes.units(shown.rstrip("\n")))
                inner = _boundaries(segmenter, shown)
                for encoder in encoders:
                    _measure(encoder, line, inner, rows[encoder.name], used[encoder.name], wrong[encoder.name])
        if not lines:
            raise UserError(f"tokenizer report: {domain} has no text")
        found[domain] = {
            encoder.name: _figures(rows[encoder.name], wrong[encoder.name], lines, characters, size, words, encoder)
            for encoder in encoders
        }
    return {
        "boundary": boundary,
        "domains": found,
        "vocabulary": {encoder.name: _vocabulary(encoder, used[encoder.name], morphemes) for encoder in encoders},
    }


def _unique_names(encoders: Iterable[Encoder]) -> list[Encoder]:
    """Encoders of one name get numbers."""
    result: list[Encoder] = []
    for encoder in encoders:
        same = sum(other.name.partition(" #")[0] == encoder.name for other in result)
        result.append(encoder._replace(name=f"{encoder.name} #{same + 1}") if same else encoder)
    return result


def _boundaries(segmenter: Segmenter, line: str) -> set[int]:
    """Characters of a line at which a unit begins; white space that MeCab swallows at the end is left out."""
    starts, at = set(), 0
    for unit in segmenter.units(line):
        at = line.find(unit, at)
        if at < 0:
            break
        starts.add(at)
        at += len(unit)
    return starts


def _measure(encoder: Encoder, line: str, inner: set[int], row: dict[str, int], used: set[int], wrong: list[str]) -> None:
    ids, starts = encoder.encode(line)
    row["tokens"] += len(ids)
    row["fallback"] += sum(byte_of(encoder.pieces[i]) is not None for i in ids)
    row["exact"] += encoder.decode(ids) == line
    row["special"] += sum(i in encoder.special for i in ids)
    ends = [*starts[1:], len(line)]
    row["crossing"] += sum(any(at in inner for at in range(a + 1, b)) for a, b in zip(starts, ends, strict=True))
    used.update(ids)
    if encoder.sentencepiece is not None:
        theirs = encoder.sentencepiece.encode(line)
        row["agree"] += theirs == ids
        if theirs != ids and len(wrong) < SHOWN:
            wrong.append(_why(encoder, line, ids, theirs))


def _why(encoder: Encoder, line: str, ours: list[int], theirs: list[int]) -> str:
    """What two segmentations of a line differ in, and the reason."""
    if "\u2581" in line:
        return f"{line[:40]!r}: U+2581, which SentencePiece writes for a space"
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    score = encoder.sentencepiece.get_score
    gap = abs(sum(map(score, ours)) - sum(map(score, theirs)))
    kind = "equal scores" if gap < 1e-3 else f"scores {gap:.4f} apart"
    pieces = [[encoder.pieces[i] for i in ids[first : first + 4]] for ids in (ours, theirs)]
    return f"{''.join(pieces[0])!r}: {pieces[0]} and {pieces[1]}, {kind}"


def _figures(
    row: dict[str, int], wrong: list[str], lines: int, characters: int, size: int, words: int, encoder: Encoder
) -> dict[str, Any]:
    tokens = max(row["tokens"], 1)
    figures: dict[str, Any] = {
        "lines": lines,
        "characters": characters,
        "tokens": row["tokens"],
        "characters_per_token": round(characters / tokens, 4),
        "bytes_per_token": round(size / tokens, 4),
        "fertility": round(row["tokens"] / max(words, 1), 4),
        "byte_fallback": round(row["fallback"] / tokens, 6),
        "round_trip": row["exact"] / lines,
        "crossing": round(row["crossing"] / tokens, 6),
        "special": row["special"],
    }
    if encoder.sentencepiece is not None:
        figures |= {"agreement": row["agree"] / lines, "disagreements": wrong}
    return figures


def _vocabulary(encoder: Encoder, used: set[int], morphemes: Segmenter) -> dict[str, Any]:
    japanese = [p for p in encoder.pieces if is_japanese(p)]
    longer = [p for p in japanese if len(p.strip()) > 1]
    split = sum(len(morphemes.units(p.strip())) > 1 for p in longer)
    spelt = "".join(encoder.pieces[i] for i in sorted(encoder.special))
    return {
        "pieces": len(encoder.pieces),
        "japanese": len(japanese),
        "split_alone": round(split / max(len(longer), 1), 4),
        "used": len(used),
        "injected": sum(i in encoder.special for i in encoder.encode(spelt)[0]),
    }


def is_japanese(piece: str) -> bool:
    """Whether a piece holds kana or kanji."""
    return any("\u3040" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" for c in piece)


# --- for people -------------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The figures of a report as text."""
    width = max(len(name) for name in (*found["domains"], *(f"  {n}" for n in found["vocabulary"])))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:{width}s} " + " ".join(f"{cell:>11s}" for cell in cells)

    lines = [line("", COLUMNS.values())]
    for domain, rows in found["domains"].items():
        lines.append(domain)
        for name, row in rows.items():
            lines.append(line(f"  {name}", (_cell(column, row.get(column)) for column in COLUMNS)))
            lines += [f"{'':{width}s}  differs: {why}" for why in row.get("disagreements", ())]
    lines.append(line("vocabulary", ("pieces", "Japanese", "split alone", "used", "injected")))
    for name, row in found["vocabulary"].items():
        counts = [f"{row[key]:,}" for key in ("pieces", "japanese", "used", "injected")]
        lines.append(line(f"  {name}", (*counts[:2], f"{row['split_alone']:.1%}", *counts[2:])))
    lines.append(f"crossing: tokens over a boundary of {found['boundary']} units; split alone: by MeCab, of Japanese pieces")
    return "\n".join(lines)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in SHARES:
        return f"{value:.3%}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def picture(found: dict[str, Any], path: Path) -> None:
    """Draws compression by domain and tokenizer; the suffix of `path` says the format (.svg, .png, .pdf)."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot: {path} must end with .svg, .png or .pdf")
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt
    import matplotlib_fontja

    from tanuki_jax import files

    matplotlib_fontja.japanize()
    names, domains = list(found["vocabulary"]), list(found["domains"])
    figure, grid = plt.subplots(1, 2, figsize=(max(8, 2.2 * len(domains)), 3.6))
    quantities = (
        ("characters_per_token", "文字/トークン (characters per token)", 1),
        ("byte_fallback", "バイト (byte fallback), %", 100),
    )
    for axes, (key, label, scale) in zip(grid, quantities, strict=True):
        for k, name in enumerate(names):
            heights = [scale * found["domains"][domain][name][key] for domain in domains]
            places = [i + (k - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(domains))]
            bars = axes.bar(places, heights, 0.8 / len(names), label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.set_xticks(range(len(domains)), domains, rotation=20, ha="right")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), bbox_inches="tight")
    plt.close(figure)
