"""What every vocabulary holds, whatever the text: special tokens, the characters of their spelling, modern symbols."""

from __future__ import annotations

import string
from pathlib import Path

# Ids 0 to 3 as in the original tokenizer; the others are control symbols too, which no text can produce.
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
CONTROLS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<llm-code>", "</llm-code>", "<llm-code-output>", "</llm-code-output>")
# Every character of a special token or a byte piece has its own piece: their spelling in text then never is that token.
SPELLING = "".join(sorted(set("".join((UNK, BOS, EOS, PAD, *CONTROLS)) + "0123456789ABCDEFx")))

# Modern text needs these whatever the training text is, so a large vocabulary gives each a piece: ASCII, Latin-1,
# punctuation, sub- and superscripts, arrows, operators, and JIS X 0208 (kana, Greek, symbols, 6,355 kanji).
RANGES = ((0x21, 0x7F), (0xA1, 0x100), (0x2010, 0x2050), (0x2070, 0x20A0), (0x20AC, 0x20AD), (0x2190, 0x21D5), (0x2200, 0x2270))
JIS = "".join(bytes((row, cell)).decode("euc_jp", "ignore") for row in range(0xA1, 0xF5) for cell in range(0xA1, 0xFF))
OTHERS = "\uff5e\u27e8\u27e9\xad"  # full-width tilde, angle brackets
_MODERN = {*SPELLING, *JIS, *OTHERS, *(chr(i) for first, last in RANGES for i in range(first, last))}
MODERN = "".join(sorted(c for c in _MODERN if not c.isspace() and c.isprintable()))
# Symbols of Markdown, TeX, HTML and code, which books do not have.  Alone and after a space, each counts as SYMBOL_COUNT
# occurrences more.
_SYMBOLS_FILE = Path(__file__).parent / "symbols.txt"
SYMBOLS = tuple(sorted(set(_SYMBOLS_FILE.read_text(encoding="utf-8").split()) | set(string.punctuation)))
SYMBOL_COUNT = 20
LARGE_VOCAB = 4 * len(MODERN)  # a smaller vocabulary gets neither MODERN nor SYMBOLS

MAX_PIECE_LENGTH = 16
MAX_SEEDS = 1_000_000


def required_characters(vocab_size: int) -> str:
    """Characters that have a piece in every vocabulary of this size."""
    return MODERN if vocab_size >= LARGE_VOCAB else SPELLING
