"""Verdicts of a judge who compares two answers, and what two verdicts in both orders come to."""

from __future__ import annotations

import re
import unicodedata

MARK = re.compile(r"\[\[\s*([ABC])\s*\]\]")
THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
QUOTED = (
    re.compile(r"```.*?(?:```|\Z)", re.DOTALL),
    re.compile(r"^[ \t]*>.*$", re.MULTILINE),
    re.compile(r'"[^"\n]*"'),
    re.compile(r"'\[\[[^\]\n]{1,9}\]\]'"),  # an apostrophe is a quotation mark only where it hugs a mark
    *(re.compile(rf"{a}[^{a}{b}\n]*{b}") for a, b in ("“”", "‘’", "「」", "『』", "«»", "``")),
)
AT_END = re.compile(r"\]\]\W{0,9}(?:です|でした|とします|となります)?\W{0,9}\Z")  # a sentence in Japanese ends with its verb

AGREED, TIE, MIXED = "agreed", "tie", "one_tie"
FIRST, SECOND = "first_position", "second_position"
UNPARSABLE, FAILED = "unparsable", "failed"
OUTCOMES = (AGREED, TIE, MIXED, FIRST, SECOND, UNPARSABLE, FAILED)


def parse(text: str) -> str:
    """The verdict of a judge's answer: A, B, C (a tie), or "" where there is none or more than one.

    Marks that are quoted do not count: a judge repeats its instructions, or what an answer says.  The marks that do count must
    all be the same.  Where every mark is quoted, the mark that ends the text is the verdict if it is the only one that occurs
    ('My verdict: "[[A]]"').  FastChat takes [[A]] if it occurs anywhere, else [[B]], which favours A.
    """
    text = unicodedata.normalize("NFKC", THOUGHT.sub("", text)).strip()
    quoted = _mark_quotes(text)
    marks = [(match.start(), match[1]) for match in MARK.finditer(text)]
    plain = {letter for at, letter in marks if not quoted[at]}
    if plain:
        return plain.pop() if len(plain) == 1 else ""
    letters = {letter for _, letter in marks}
    return letters.pop() if len(letters) == 1 and AT_END.search(text) else ""


def _mark_quotes(text: str) -> bytearray:
    """For each character whether it is quoted: between quotation marks, in code, or in a line that begins with >."""
    flags = bytearray(len(text))
    for pattern in QUOTED:
        for match in pattern.finditer(text):
            flags[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    return flags


def judge(first: str | None, second: str | None) -> tuple[str, int]:
    """What two verdicts come to: one of OUTCOMES, and which answer (0 or 1) is better where they agree, else -1.

    Args:
      first, second: texts of the judge, of the first order and of the one with the answers' places changed; None where the
        call failed.
    """
    if first is None or second is None:
        return FAILED, -1
    verdicts = parse(first) + parse(second)
    if len(verdicts) < 2:
        return UNPARSABLE, -1
    if verdicts in ("AB", "BA"):
        return AGREED, "AB".index(verdicts[0])
    if verdicts == "CC":
        return TIE, -1
    if "C" in verdicts:
        return MIXED, -1
    return (FIRST if verdicts == "AA" else SECOND), -1
