"""Measures tokenizers on given text: compression, losslessness, boundaries, special tokens, vocabulary use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NotRequired, TypedDict

from tokenization.encoders import Encoder, SentencePieceModel, is_byte_piece
from tokenization.errors import TokenizationError
from tokenization.segment import Segmenter

MAX_EXAMPLES = 5  # disagreements that are shown
PERCENTAGES = ("byte_fallback", "round_trip", "crossing", "agreement")
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


class DomainFigures(TypedDict):
    """Figures of one tokenizer on one domain; texts are measured line by line.

    characters_per_token and bytes_per_token: higher is better.  fertility: tokens per MeCab morpheme.  byte_fallback: share of
    tokens that spell a byte.  round_trip: share of lines that come back exactly.  crossing: share of tokens that go over the
    boundary of a unit.  special: special tokens that text gave.  agreement: share of lines to which tokenizer.json and the
    SentencePiece model next to it give the same ids, with its `disagreements`.
    """

    lines: int
    characters: int
    tokens: int
    characters_per_token: float
    bytes_per_token: float
    fertility: float
    byte_fallback: float
    round_trip: float
    crossing: float
    special: int
    agreement: NotRequired[float]
    disagreements: NotRequired[list[str]]


class VocabularyFigures(TypedDict):
    """Figures of one vocabulary.

    japanese: pieces with kana or kanji.  split_alone: share of the Japanese pieces of several characters that MeCab cuts when
    it sees them alone.  used: ids that the texts used.  injected: special tokens that their own spelling gave.
    """

    pieces: int
    japanese: int
    split_alone: float
    used: int
    injected: int


class Report(TypedDict):
    """Figures by domain and tokenizer, and by tokenizer."""

    boundary: str
    domains: dict[str, dict[str, DomainFigures]]
    vocabulary: dict[str, VocabularyFigures]


@dataclass
class _Totals:
    """Sizes of a domain's texts."""

    lines: int = 0
    characters: int = 0
    bytes: int = 0
    morphemes: int = 0


@dataclass
class _Tally:
    """What is counted of one tokenizer on one domain."""

    tokens: int = 0
    byte_pieces: int = 0
    exact: int = 0
    special: int = 0
    crossing: int = 0
    agreeing: int = 0
    disagreements: list[str] = field(default_factory=list)


def report(
    encoders: Iterable[Encoder], domains: Mapping[str, Iterable[str]], boundary: str = "bunsetsu", dictionary: str = "ipadic"
) -> Report:
    """Measures each tokenizer on the texts of each domain.

    boundary: of the units of which `crossing` counts the boundaries.
    """
    encoders, morphemes = _unique_names(encoders), Segmenter("morpheme", dictionary)
    segmenter = Segmenter(boundary, dictionary)
    used: dict[str, set[int]] = {encoder.name: set() for encoder in encoders}
    result: dict[str, dict[str, DomainFigures]] = {}
    for domain, texts in domains.items():
        totals, tallies = _Totals(), {encoder.name: _Tally() for encoder in encoders}
        for text in texts:
            for line in text.splitlines(keepends=True):
                visible = line.replace("\0", "\ufffd")  # MeCab stops at NUL
                totals.lines += 1
                totals.characters += len(line)
                totals.bytes += len(line.encode())
                totals.morphemes += len(morphemes.units(visible.rstrip("\n")))
                unit_starts = _unit_starts(segmenter, visible)
                for encoder in encoders:
                    used[encoder.name].update(_measure(encoder, line, unit_starts, tallies[encoder.name]))
        if not totals.lines:
            raise TokenizationError(f"tokenizer report: {domain} has no text")
        result[domain] = {encoder.name: _figures(encoder, tallies[encoder.name], totals) for encoder in encoders}
    return {
        "boundary": boundary,
        "domains": result,
        "vocabulary": {encoder.name: _vocabulary(encoder, used[encoder.name], morphemes) for encoder in encoders},
    }


def _unique_names(encoders: Iterable[Encoder]) -> list[Encoder]:
    """The encoders, those of one name with numbers."""
    result: list[Encoder] = []
    for encoder in encoders:
        same = sum(other.name.partition(" #")[0] == encoder.name for other in result)
        result.append(encoder._replace(name=f"{encoder.name} #{same + 1}") if same else encoder)
    return result


def _unit_starts(segmenter: Segmenter, line: str) -> set[int]:
    """Characters of a line at which a unit begins; white space that MeCab swallows at the end is left out."""
    starts, position = set(), 0
    for unit in segmenter.units(line):
        position = line.find(unit, position)
        if position < 0:
            break
        starts.add(position)
        position += len(unit)
    return starts


def _measure(encoder: Encoder, line: str, unit_starts: set[int], tally: _Tally) -> list[int]:
    """Adds a line to the tally; returns its ids."""
    ids, starts = encoder.encode(line)
    tally.tokens += len(ids)
    tally.byte_pieces += sum(is_byte_piece(encoder.pieces[i]) for i in ids)
    tally.exact += encoder.decode(ids) == line
    tally.special += sum(i in encoder.special for i in ids)
    spans = zip(starts, [*starts[1:], len(line)], strict=True)
    tally.crossing += sum(any(c in unit_starts for c in range(start + 1, stop)) for start, stop in spans)
    if encoder.sentencepiece is not None:
        other_ids = encoder.sentencepiece.encode(line)
        tally.agreeing += other_ids == ids
        if other_ids != ids and len(tally.disagreements) < MAX_EXAMPLES:
            tally.disagreements.append(_explain(encoder.pieces, encoder.sentencepiece, line, (ids, other_ids)))
    return ids


def _explain(pieces: list[str], model: SentencePieceModel, line: str, readings: tuple[list[int], list[int]]) -> str:
    """The first difference between two segmentations of a line, and its reason."""
    if "\u2581" in line:
        return f"{line[:40]!r}: U+2581, which SentencePiece writes for a space"
    first = next((i for i, (a, b) in enumerate(zip(*readings, strict=False)) if a != b), 0)
    scores = [sum(map(model.get_score, ids)) for ids in readings]
    gap = abs(scores[0] - scores[1])
    reason = "equal scores" if gap < 1e-3 else f"scores {gap:.4f} apart"
    ours, theirs = [[pieces[i] for i in ids[first : first + 4]] for ids in readings]
    return f"{''.join(ours)!r}: {ours} and {theirs}, {reason}"


def _figures(encoder: Encoder, tally: _Tally, totals: _Totals) -> DomainFigures:
    tokens = max(tally.tokens, 1)
    figures: DomainFigures = {
        "lines": totals.lines,
        "characters": totals.characters,
        "tokens": tally.tokens,
        "characters_per_token": round(totals.characters / tokens, 4),
        "bytes_per_token": round(totals.bytes / tokens, 4),
        "fertility": round(tally.tokens / max(totals.morphemes, 1), 4),
        "byte_fallback": round(tally.byte_pieces / tokens, 6),
        "round_trip": tally.exact / totals.lines,
        "crossing": round(tally.crossing / tokens, 6),
        "special": tally.special,
    }
    if encoder.sentencepiece is not None:
        figures["agreement"] = tally.agreeing / totals.lines
        figures["disagreements"] = tally.disagreements
    return figures


def _vocabulary(encoder: Encoder, used: set[int], morphemes: Segmenter) -> VocabularyFigures:
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


def table(result: Report) -> str:
    """The figures of a report as text."""
    width = max(len(name) for name in (*result["domains"], *(f"  {n}" for n in result["vocabulary"])))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:{width}s} " + " ".join(f"{cell:>11s}" for cell in cells)

    lines = [line("", COLUMNS.values())]
    for domain, rows in result["domains"].items():
        lines.append(domain)
        for name, row in rows.items():
            lines.append(line(f"  {name}", (_cell(column, row.get(column)) for column in COLUMNS)))
            lines += [f"{'':{width}s}  differs: {reason}" for reason in row.get("disagreements", ())]
    lines.append(line("vocabulary", ("pieces", "Japanese", "split alone", "used", "injected")))
    for name, figures in result["vocabulary"].items():
        counts = [f"{n:,}" for n in (figures["pieces"], figures["japanese"], figures["used"], figures["injected"])]
        lines.append(line(f"  {name}", (*counts[:2], f"{figures['split_alone']:.1%}", *counts[2:])))
    lines.append(f"crossing: tokens over a boundary of {result['boundary']} units; split alone: by MeCab, of Japanese pieces")
    return "\n".join(lines)


def _cell(column: str, value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    if column in PERCENTAGES:
        return f"{value:.3%}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def plot_format(path: Path) -> str:
    """The format that the suffix of a plot's file names."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise TokenizationError(f"--plot: {path} must end with .svg, .png or .pdf")
    return path.suffix.removeprefix(".")


def plot(result: Report, file: Path | IO[bytes], file_format: str) -> None:
    """Draws compression by domain and tokenizer to a file, as svg, png or pdf."""
    import matplotlib

    matplotlib.use("svg" if file_format == "svg" else "agg")
    import matplotlib.pyplot as plt
    import matplotlib_fontja

    matplotlib_fontja.japanize()
    names, domains = list(result["vocabulary"]), list(result["domains"])
    figure, (compression, fallback) = plt.subplots(1, 2, figsize=(max(8, 2.2 * len(domains)), 3.6))
    for k, name in enumerate(names):
        figures = [result["domains"][domain][name] for domain in domains]
        positions = [i + (k - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(domains))]
        for axes, heights in (
            (compression, [row["characters_per_token"] for row in figures]),
            (fallback, [100 * row["byte_fallback"] for row in figures]),
        ):
            axes.bar_label(axes.bar(positions, heights, 0.8 / len(names), label=name), fmt="%.2f", fontsize=7)
    compression.set_ylabel("文字/トークン (characters per token)")
    fallback.set_ylabel("バイト (byte fallback), %")
    for axes in (compression, fallback):
        axes.set_xticks(range(len(domains)), domains, rotation=20, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    compression.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, format=file_format, bbox_inches="tight")
    plt.close(figure)
