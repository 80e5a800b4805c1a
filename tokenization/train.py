"""Trains the tokenizer: SentencePiece unigram on counted units, so that no piece can cross a boundary."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tanuki_jax.errors import UserError
from tokenization.export import export
from tokenization.segment import count_units

# Ids 0 to 3 as in the original tokenizer; the others are control symbols too, which no text can produce.
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
CONTROLS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<llm-code>", "</llm-code>", "<llm-code-output>", "</llm-code-output>")
# Every character of a special token or a byte piece has its own piece: their spelling in text then never is that token.
SPELLING = "".join(sorted(set("".join((UNK, BOS, EOS, PAD, *CONTROLS)) + "0123456789ABCDEFx")))

LONGEST_PIECE = 16
SEEDS = 1_000_000


class Trained(NamedTuple):
    """What was learnt from."""

    pieces: int
    units: int
    distinct_units: int

    def __str__(self) -> str:
        return f"{self.pieces:,} pieces from {self.units:,} MeCab units ({self.distinct_units:,} distinct)"


def train(texts: Iterable[str], output: Path, vocab_size: int, character_coverage: float = 0.9995) -> Trained:
    """Writes tokenizer.json (canonical), tokenizer.model, tokenizer_config.json and special_tokens_map.json to `output`.

    Identity normalisation, no dummy prefix, byte fallback, single digits, the newline as a piece.  The vocabulary is
    smaller than asked for where the text has too few distinct units.
    """
    import sentencepiece

    counts = count_units(texts)
    if not counts:
        raise UserError("tokenizer: the corpus is empty; --input must match files with text")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "units.tsv"
        with table.open("w", encoding="utf-8") as f:
            f.writelines(f"{unit}\t{n}\n" for unit, n in sorted(counts.items()) if "\t" not in unit)
            # A character that occurs in one word only would lose its own piece to that word, and the word then be pruned
            # for want of an alternative; seen once alone, each keeps a small probability.
            f.writelines(f"{character}\t1\n" for character in sorted(set("".join(counts)) - {"\t"}))
        seeds = Path(scratch) / "seeds.tsv"
        with seeds.open("w", encoding="utf-8") as f:
            f.writelines(f"{piece}\t{n}\n" for piece, n in seed_pieces(counts))
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(table),
                input_format="tsv",
                seed_sentencepieces_file=str(seeds),
                model_prefix=str(output / "tokenizer"),
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
                max_sentence_length=1 << 20,
                required_chars=SPELLING,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                control_symbols=list(CONTROLS),
                user_defined_symbols=["\n"],
                num_threads=2,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"tokenizer: SentencePiece could not train {vocab_size} pieces: {str(error).splitlines()[-1]}"
            ) from error
    (output / "tokenizer.vocab").unlink()
    _forget_paths(output / "tokenizer.model")
    pieces = export(output / "tokenizer.model", output)
    return Trained(pieces, sum(counts.values()), len(counts))


def _forget_paths(path: Path) -> None:
    """Takes the names of scratch files out of a model, so that two trainings on one text give one file."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    for field in ("input", "model_prefix", "seed_sentencepieces_file"):
        model.trainer_spec.ClearField(field)
    path.write_bytes(model.SerializeToString())


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
