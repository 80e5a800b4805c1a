"""Whether bytes and strings are text: UTF-8 without marks, and without what another encoding leaves in it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from tanuki_jax.errors import UserError

MARKS = {
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}  # with which a file of that encoding begins; the longer ones first
UTF8_MARK = b"\xef\xbb\xbf"
GUESSED = {"utf-16-le": "UTF-16LE", "euc_jp": "EUC-JP", "cp932": "CP932", "utf-16-be": "UTF-16BE"}  # iconv's names


def without_mark(first: bytes, path: str) -> bytes:
    """The first bytes of a file without UTF-8's byte order mark; one of another encoding is an error."""
    for mark, name in MARKS.items():
        if first.startswith(mark):
            raise UserError(f"data: {path} is {name}, as its first bytes say; {convert(name)}")
    return first.removeprefix(UTF8_MARK)


def decode(data: bytes, where: str) -> str:
    """UTF-8 as a string; anything else is an error that guesses what it is."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = _guess(data)
        seems = f" (it seems to be {guess})" if guess else ""
        raise UserError(f"data: {where} is not valid UTF-8 at byte {error.start}{seems}; {convert(guess)}") from error


def convert(encoding: str) -> str:
    """How to turn a file into UTF-8."""
    return f"convert it, for example with iconv -f {encoding or 'ENCODING'} -t UTF-8 FILE > NEW"


def _guess(data: bytes) -> str:
    """The encoding in which bytes are Japanese; empty where none is likely."""
    sample = data[:4096]
    for encoding, name in GUESSED.items():
        text = sample.decode(encoding, "ignore")
        japanese = sum("\u3000" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" for c in text)
        plain = sum(" " <= c <= "~" or c in "\n\r\t" for c in text)
        if japanese + plain >= 0.9 * len(text) and japanese >= 0.3 * len(text) and len(text) >= 0.4 * len(sample):
            return name
    return ""


def problem(text: str) -> str:
    """What is wrong with a string that should be text: characters that only another encoding leaves; empty = nothing."""
    if "\0" in text:
        if text.count("\0") * 4 < len(text):
            return f"holds a NUL character at {text.index(chr(0))}, which is no text; remove it"
        big = text.startswith("\0")
        return f"holds NUL characters, as UTF-16 or UTF-32 read as UTF-8 does; {convert('UTF-16BE' if big else 'UTF-16LE')}"
    if "\x1b" in text:
        at = text.index("\x1b")
        if text[at + 1 : at + 2] in ("$", "("):
            return f"holds ESC {text[at + 1]}, as ISO-2022-JP read as UTF-8 does; {convert('ISO-2022-JP')}"
        return f"holds an ESC character at {at} (a terminal's colours?), which is no text; remove it"
    return ""


def check(fields: Mapping[str, Any], names: Container[str], where: str) -> None:
    """An error where a string anywhere in the fields `names` of a row is not text."""
    for name, value in fields.items():
        for text in _strings(value) if name in names else ():
            if found := problem(text):
                raise UserError(f"data: {where}: {name} {found}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list) and not (value and isinstance(value[0], int)):  # ids are no text
        for inner in value:
            yield from _strings(inner)
