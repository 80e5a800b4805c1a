"""Checks that bytes and strings are text: UTF-8, without byte order marks or traces of another encoding."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from tanuki_jax.errors import UserError

BYTE_ORDER_MARKS = {
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}  # byte order marks, the longer ones first
UTF8_BOM = b"\xef\xbb\xbf"
GUESSES = {"utf-16-le": "UTF-16LE", "euc_jp": "EUC-JP", "cp932": "CP932", "utf-16-be": "UTF-16BE"}  # iconv's names


def strip_byte_order_mark(first: bytes, path: str) -> bytes:
    """The first bytes of a file without UTF-8's byte order mark; the mark of another encoding is an error."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if first.startswith(mark):
            raise UserError(f"data: {path} is {name}, as its first bytes say; {conversion_hint(name)}")
    return first.removeprefix(UTF8_BOM)


def decode(data: bytes, where: str) -> str:
    """UTF-8 bytes as a string; anything else is an error that guesses the encoding."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = _guess(data)
        seems = f" (it seems to be {guess})" if guess else ""
        raise UserError(f"data: {where} is not valid UTF-8 at byte {error.start}{seems}; {conversion_hint(guess)}") from error


def conversion_hint(encoding: str) -> str:
    """A hint for messages: the command that converts a file to UTF-8."""
    return f"convert it, for example with iconv -f {encoding or 'ENCODING'} -t UTF-8 FILE > NEW"


def _guess(data: bytes) -> str:
    """The encoding in which bytes are Japanese; empty where none is likely."""
    sample = data[:4096]
    for encoding, name in GUESSES.items():
        text = sample.decode(encoding, "ignore")
        japanese = sum("\u3000" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" for c in text)
        plain = sum(" " <= c <= "~" or c in "\n\r\t" for c in text)
        if japanese + plain >= 0.9 * len(text) and japanese >= 0.3 * len(text) and len(text) >= 0.4 * len(sample):
            return name
    return ""


def problem(text: str) -> str:
    """What is wrong with a string that should be text: characters that come from another encoding; empty = nothing."""
    if "\0" in text:
        if text.count("\0") * 4 < len(text):
            return f"holds a NUL character at {text.index(chr(0))}, which is no text; remove it"
        hint = conversion_hint("UTF-16BE" if text.startswith("\0") else "UTF-16LE")
        return f"holds NUL characters, as UTF-16 or UTF-32 read as UTF-8 does; {hint}"
    if "\x1b" in text:
        at = text.index("\x1b")
        if text[at + 1 : at + 2] in ("$", "("):
            return f"holds ESC {text[at + 1]}, as ISO-2022-JP read as UTF-8 does; {conversion_hint('ISO-2022-JP')}"
        return f"holds an ESC character at {at} (a terminal's colours?), which is no text; remove it"
    return ""


def check(fields: Mapping[str, object], names: Container[str], where: str) -> None:
    """Refuses a row with a string that is not text anywhere in its fields `names`."""
    for name, value in fields.items():
        for text in _strings(value) if name in names else ():
            reason = problem(text)
            if reason:
                raise UserError(f"data: {where}: {name} {reason}")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list) and not (value and isinstance(value[0], int)):  # ids are no text
        for inner in value:
            yield from _strings(inner)
