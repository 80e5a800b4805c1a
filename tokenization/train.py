"""Trains the tokenizer: SentencePiece unigram on counted units, so that no piece can cross a boundary."""

from __future__ import annotations

import collections
import itertools
import math
import os
import string
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tanuki_jax import files
from tanuki_jax.errors import UserError
from tokenization.export import export
from tokenization.segment import LEVELS, count_units, lines

# Ids 0 to 3 as in the original tokenizer; the others are control symbols too, which no text can produce.
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
CONTROLS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<llm-code>", "</llm-code>", "<llm-code-output>", "</llm-code-output>")
# Every character of a special token or a byte piece has its own piece: their spelling in text then never is that token.
SPELLING = "".join(sorted(set("".join((UNK, BOS, EOS, PAD, *CONTROLS)) + "0123456789ABCDEFx")))

# Modern text needs these whatever the training text is, so a vocabulary that has room gives each a piece: ASCII, Latin-1,
# punctuation, sub- and superscripts, arrows, operators, and JIS X 0208 (kana, Greek, symbols, 6,355 kanji).
RANGES = ((0x21, 0x7F), (0xA1, 0x100), (0x2010, 0x2050), (0x2070, 0x20A0), (0x20AC, 0x20AD), (0x2190, 0x21D5), (0x2200, 0x2270))
JIS = "".join(bytes((row, cell)).decode("euc_jp", "ignore") for row in range(0xA1, 0xF5) for cell in range(0xA1, 0xFF))
OTHERS = "\uff5e\u27e8\u27e9\xad"  # full-width tilde, angle brackets
_MODERN = {*SPELLING, *JIS, *OTHERS, *(chr(i) for first, last in RANGES for i in range(first, last))}
MODERN = "".join(sorted(c for c in _MODERN if not c.isspace() and c.isprintable()))
# Marks of Markdown, TeX, HTML and code, which books do not have, alone and after a space; each counts MARK times besides.
MARKS = tuple(sorted(set((Path(__file__).parent / "marks.txt").read_text(encoding="utf-8").split()) | set(string.punctuation)))
MARK = 20
ROOM = 4 * len(MODERN)  # a smaller vocabulary has neither MODERN nor MARKS

LONGEST_PIECE = 16
SEEDS = 1_000_000
SURPLUS = 1.1  # pieces trained for each language above its share, since some will be common to several


class Trained(NamedTuple):
    """What was learnt from, and what came of it."""

    pieces: int
    units: int
    distinct_units: int
    forgotten: int  # occurrences of units that did not fit memory
    by_language: dict[str, int]  # pieces that are likelier in a language's units than in the others'

    def __str__(self) -> str:
        language_weights = ", ".join(f"{n:,} {language or 'of no named language'}" for language, n in self.by_language.items())
        lost = f"; {self.forgotten:,} units too rare for memory were left out" if self.forgotten else ""
        return f"{self.pieces:,} pieces ({language_weights}) from {self.units:,} units ({self.distinct_units:,} distinct){lost}"


def train(
    texts: Iterable[tuple[str, str]],
    output: Path,
    vocab_size: int,
    character_coverage: float = 0.9995,
    boundary: str = "bunsetsu",
    dictionary: str = "ipadic",
    language_weights: Mapping[str, float] | None = None,
) -> Trained:
    """Writes tokenizer.json (canonical), tokenizer.model, tokenizer_config.json and special_tokens_map.json to `output`.

    Identity normalisation, no dummy prefix, byte fallback, single digits, the newline as a piece.  The vocabulary is
    smaller than asked for where the text has too few distinct units.

    Args:
      texts: (language, text) pairs; the language is any name, or empty.
      boundary: what no piece may cross: a MeCab morpheme (the paper's rule), a predicate, a bunsetsu, or none (white space).
      language_weights: language -> its share of the vocabulary; each is then trained alone, and the model is their mixture
        by tokens.  Without, the language_weights are what comes of training on everything.
    """
    if boundary not in LEVELS:
        raise UserError(f"tokenizer: boundary {boundary!r} is none of {', '.join(LEVELS)}")
    check_options(vocab_size, character_coverage, language_weights)
    with files.disk_errors(output.resolve().parent, "tokenizer"):
        return _train(texts, output, vocab_size, character_coverage, boundary, dictionary, language_weights)


def check_options(vocab_size: int, character_coverage: float, language_weights: Mapping[str, float] | None) -> None:
    """An error about numbers with which no tokenizer can be trained."""
    least = len((UNK, BOS, EOS, PAD, *CONTROLS)) + 256 + 1 + len(SPELLING)  # bytes, the newline
    if not least < vocab_size <= 1 << 24:
        raise UserError(
            f"tokenizer: vocab_size {vocab_size} pieces cannot be: there must be more than {least}, which are special tokens, "
            f"bytes and their characters, and at most {1 << 24:,}"
        )
    if not 0 < character_coverage <= 1:
        raise UserError(f"tokenizer: character_coverage {character_coverage} must be above 0 and at most 1 (0.9995)")
    if language_weights and not all(0 < share < math.inf for share in language_weights.values()):
        raise UserError(f"tokenizer: every share of the vocabulary must be a number above 0: {dict(language_weights)}")


def _train(
    texts: Iterable[tuple[str, str]],
    output: Path,
    vocab_size: int,
    character_coverage: float,
    boundary: str,
    dictionary: str,
    language_weights: Mapping[str, float] | None,
) -> Trained:
    if boundary == "none":
        counts, forgotten = _count_lines(texts), 0
    else:
        counts, forgotten = count_units(texts, boundary, dictionary)
    if not any(counts.values()):
        raise UserError("tokenizer: the corpus is empty; --input must match files with text")
    output.mkdir(parents=True, exist_ok=True)
    if language_weights:
        model = _mixture(counts, language_weights, vocab_size, character_coverage, boundary)
    else:
        together: collections.Counter[str] = collections.Counter()
        for found in counts.values():
            together.update(found)
        model = _fit(together, vocab_size, character_coverage, boundary)
    (output / "tokenizer.model").write_bytes(model.SerializeToString())
    pieces = export(output / "tokenizer.model", output)
    units = sum(found.total() for found in counts.values())
    distinct = len(set().union(*counts.values()))
    return Trained(pieces, units, distinct, forgotten, _by_language(model, counts))


def _fit(counts: collections.Counter[str], vocab_size: int, character_coverage: float, boundary: str) -> Any:
    """A SentencePiece model (protobuf) of counted units."""
    import sentencepiece

    required, marks = SPELLING, collections.Counter[str]()
    if vocab_size >= ROOM:
        required, marks = MODERN, collections.Counter(dict.fromkeys([*MARKS, *(f" {mark}" for mark in MARKS)], MARK))
    with tempfile.TemporaryDirectory() as scratch, files.disk_errors(Path(scratch), "tokenizer"):
        table, seeds = Path(scratch) / "units.tsv", Path(scratch) / "seeds.tsv"
        with table.open("w", encoding="utf-8") as f:
            f.writelines(f"{unit}\t{n}\n" for unit, n in sorted(counts.items()) if "\t" not in unit)
            f.writelines(f"{mark}\t{n}\n" for mark, n in marks.items())
            # A character that occurs in one word only would lose its own piece to that word, and the word then be pruned
            # for want of an alternative; seen once alone, each keeps a small probability.
            f.writelines(f"{character}\t1\n" for character in sorted({*"".join(counts), *required} - {"\t"}))
        options: dict[str, Any] = {}
        if boundary != "none":  # lines seldom repeat, and SentencePiece's own seeds are right for them
            with seeds.open("w", encoding="utf-8") as f:
                f.writelines(f"{piece}\t{n}\n" for piece, n in seed_pieces(counts + marks))
            options["seed_sentencepieces_file"] = str(seeds)
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(table),
                input_format="tsv",
                model_prefix=str(Path(scratch) / "tokenizer"),
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=character_coverage,
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                normalization_rule_name="identity",
                max_sentence_length=1 << 30,  # longer lines would be dropped without a word
                max_sentencepiece_length=LONGEST_PIECE,
                required_chars=required,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                control_symbols=list(CONTROLS),
                user_defined_symbols=["\n"],
                num_threads=os.cpu_count() or 1,
                minloglevel=2,
                **options,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"tokenizer: SentencePiece could not train {vocab_size} pieces: {(str(error).splitlines() or ['?'])[-1]}"
            ) from error
        model = _read_model(Path(scratch) / "tokenizer.model")
    for field in ("input", "model_prefix", "seed_sentencepieces_file", "num_threads"):
        model.trainer_spec.ClearField(field)  # so that two trainings on one text give one file
    return model


def _read_model(path: Path) -> Any:
    """What SentencePiece wrote; it does not say when the disk was full."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    data = path.read_bytes() if path.is_file() else b""
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
    except DecodeError:
        model = None
    if model is None or not model.HasField("normalizer_spec"):  # which comes last
        raise UserError(
            f"tokenizer: SentencePiece left no whole model in {path.parent}; is the disk full? TMPDIR names another"
        )
    return model


def seed_pieces(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Candidates: the substrings of 2 to 16 characters that occur at least twice, with their true counts.

    SentencePiece's own seeds ignore the counts of a table, which leaves the commonest words in pieces.
    """
    found: collections.Counter[str] = collections.Counter()
    for unit, n in counts.items():
        text = unit.replace(" ", "\u2581")
        for start in range(len(text)):
            for end in range(start + 2, min(start + LONGEST_PIECE, len(text)) + 1):
                found[text[start:end]] += n
    best = sorted(((piece, n) for piece, n in found.items() if n > 1), key=lambda item: (-item[1] * len(item[0]), item[0]))
    return best[:SEEDS]


def _count_lines(texts: Iterable[tuple[str, str]]) -> dict[str, collections.Counter[str]]:
    """Lines as units, for the boundary none; all distinct lines are in memory, as SentencePiece needs them."""
    counts: dict[str, collections.Counter[str]] = {}
    for language, text in texts:
        counts.setdefault(language, collections.Counter()).update(line.replace("\t", " ") for line in lines(text) if line)
    return counts


# --- several languages ----------------------------------------------------------------------------------------------------


def _mixture(
    counts: Mapping[str, collections.Counter[str]],
    language_weights: Mapping[str, float],
    vocab_size: int,
    character_coverage: float,
    boundary: str,
) -> Any:
    """One model of languages trained apart: p(piece) = sum over languages of (its share of tokens) x p(piece | language).

    Each language has exactly its share of the pieces of several characters, as long as it has that many; a piece of several
    languages counts for the one in which it is commonest.  Single characters are common to all.
    """
    if set(language_weights) != set(counts):
        raise UserError(
            f"tokenizer: language_weights are given for {', '.join(language_weights)}, the text is in "
            f"{', '.join(map(repr, counts))}"
        )
    whole = sum(language_weights.values())
    models = {}
    for language, found in counts.items():
        common = 300 + len(MODERN if vocab_size >= ROOM else SPELLING) + len(set("".join(found)))  # special, bytes, characters
        size = min(vocab_size, common + math.ceil(SURPLUS * vocab_size * language_weights[language] / whole))
        models[language] = _fit(found, size, character_coverage, boundary)
    tokens = {language: _tokens(models[language], found) for language, found in counts.items()}
    probability: dict[str, dict[str, float]] = {}  # piece -> language -> its part of the mixture
    for language, model in models.items():
        for piece in model.pieces:
            if piece.type == piece.NORMAL:
                part = tokens[language] / sum(tokens.values()) * math.exp(piece.score)
                probability.setdefault(piece.piece, {})[language] = part
    total = {piece: sum(parts.values()) for piece, parts in probability.items()}
    owner = {piece: max(parts, key=lambda name: parts[name]) for piece, parts in probability.items()}
    ranked = sorted(total, key=lambda piece: (-total[piece], piece))
    result = next(iter(models.values()))
    special = [piece for piece in result.pieces if piece.type != piece.NORMAL]
    kept = {piece for piece in ranked if len(piece) == 1}
    room = max(0, vocab_size - len(special) - len(kept))
    edges = [round(room * total / whole) for total in itertools.accumulate(language_weights.values(), initial=0.0)]
    for language, first, last in zip(language_weights, edges, edges[1:], strict=False):
        mine = [piece for piece in ranked if owner[piece] == language and len(piece) > 1]
        kept.update(mine[: last - first])
    del result.pieces[:]
    result.pieces.extend(special)
    for name in ranked:
        if name in kept:
            result.pieces.add(piece=name, score=math.log(total[name]))
    result.trainer_spec.vocab_size = len(result.pieces)
    return result


def _processor(model: Any) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _tokens(model: Any, counts: Mapping[str, int]) -> int:
    """Tokens of the counted units."""
    units = list(counts)
    return sum(n * len(ids) for n, ids in zip(counts.values(), _processor(model).encode(units), strict=True))


def _by_language(model: Any, counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """How many pieces are likelier in each language's units than in the others'; those that none uses are left out."""
    share: dict[int, tuple[float, str]] = {}
    processor = _processor(model)
    for language, found in counts.items():
        used: collections.Counter[int] = collections.Counter()
        for n, ids in zip(found.values(), processor.encode(list(found)), strict=True):
            for i in ids:
                used[i] += n
        total = max(1, used.total())
        for i, n in used.items():
            share[i] = max(share.get(i, (0.0, "")), (n / total, language))
    normal = {i for i, piece in enumerate(model.pieces) if piece.type == piece.NORMAL}
    best = collections.Counter(language for i, (_, language) in share.items() if i in normal)
    return {language: best[language] for language in counts}
