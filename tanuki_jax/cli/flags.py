"""Flags that mean the same in every verb, and their types."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from tanuki_jax.config.ranges import MIN_P, REPETITION_PENALTY, SEED, TEMPERATURE, TOP_K, TOP_P, Range
from tanuki_jax.config.schema import CHOICES, Recipe, Scoring, Source, range_of


def number(kind: type[int] | type[float], allowed: Range) -> Callable[[str], float]:
    """A flag's type for argparse: a number in a range."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a {'whole ' * (kind is int)}number") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"it is {text[:80]}; it must be {allowed.describe()}")
        return value

    return parse


def stage(text: str) -> str:
    """The name of one stage."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a stage, or use `tanuki run` for all")
    return text


def path(text: str) -> Path:
    """A path that the file system accepts."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("a path holds no NUL" if text else "it is empty; name a file or directory")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {error.strerror}") from None
    return Path(text)


# --- flags --------------------------------------------------------------------------------------------------------


def add_input(parser: argparse.ArgumentParser) -> None:
    """Files to read."""
    parser.add_argument(
        "--input", required=True, help="comma-separated globs of .txt, .jsonl[.gz|.zst], .parquet, ... (docs/data.md)"
    )


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Which fields of a row are read."""
    parser.add_argument("--text_field", default=Source.text, help="field with the text, a.b if nested (default %(default)s)")
    parser.add_argument("--language_field", default="", help="field with the language tag, meta.lang for example")
    add_choice(parser, Source, "row_format", "how rows that can be read in several ways are read (docs/data.md)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The directory to write."""
    parser.add_argument("--output", type=path, required=True, help="directory to write; it must not be there yet")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The model."""
    parser.add_argument("--checkpoint", type=path, required=True, help="a stage's directory (its newest step) or one step's")


def add_tokenizer_directory(parser: argparse.ArgumentParser) -> None:
    """The tokenizer."""
    parser.add_argument("--tokenizer", type=path, required=True, help="directory with tokenizer.json")


def add_json(parser: argparse.ArgumentParser) -> None:
    """JSON instead of text."""
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The seed."""
    parser.add_argument(
        "--seed", type=number(int, SEED), default=Recipe.seed, help="of everything random (default %(default)s)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen."""
    add_key(parser, Scoring, "max_new_tokens", "longest answer", default=256)
    parser.add_argument("--temperature", type=number(float, TEMPERATURE), default=0.0, help="0 = the likeliest token (default)")
    parser.add_argument("--top_p", type=number(float, TOP_P), default=1.0, help="share of the probability that is sampled from")
    parser.add_argument(
        "--top_k", type=number(int, TOP_K), default=0, help="only the likeliest so many tokens; 0 = all (default)"
    )
    parser.add_argument(
        "--min_p", type=number(float, MIN_P), default=0.0, help="least share of the likeliest token's probability"
    )
    parser.add_argument(
        "--repetition_penalty",
        type=number(float, REPETITION_PENALTY),
        default=1.0,
        help="divides the logits of tokens that the text holds; 1 = none (default)",
    )
    add_seed(parser)


def add_padded_vocab_size(parser: argparse.ArgumentParser) -> None:
    """Rows of the embedding."""
    parser.add_argument(
        "--vocab_size",
        type=number(int, Range(0, 2**24)),
        default=0,
        help="rows of embedding and head: less cuts padding off, more adds zeros; 0 = as is",
    )


def add_key(parser: argparse.ArgumentParser, schema: type, name: str, text: str, default: float | None = None) -> None:
    """A flag that is a numeric key of the schema: its type, range and, where no other is given, its default."""
    schema_default = getattr(schema, name)
    parser.add_argument(
        f"--{name}",
        type=number(type(schema_default), range_of(schema, name)),
        default=schema_default if default is None else default,
        help=f"{text} (default %(default)s)",
    )


def add_choice(parser: argparse.ArgumentParser, schema: type, name: str, text: str) -> None:
    """A flag that is a key of the schema with a few possible values: these, and its default."""
    parser.add_argument(f"--{name}", choices=CHOICES[name], default=getattr(schema, name), help=text)
