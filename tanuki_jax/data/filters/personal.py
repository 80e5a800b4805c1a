"""Personal information: e-mail addresses, phone numbers, credit cards, My Number, postal codes and addresses.

hojichar finds e-mail addresses and Japanese phone numbers; the patterns here find the others, and look at the text around a
number before they believe it.  Names of persons are not found.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tanuki_jax.data.filters.extras import require
from tanuki_jax.data.filters.texts import JAPANESE

LABELS = {  # what a mask writes, by the language of the text
    "email": ("[メールアドレス]", "[email address]"),
    "phone": ("[電話番号]", "[phone number]"),
    "card": ("[カード番号]", "[card number]"),
    "my_number": ("[個人番号]", "[My Number]"),
    "address": ("[住所]", "[address]"),
    "postal_code": ("[郵便番号]", "[postal code]"),
}

LOCAL_PART, DOMAIN = 64, 255  # longest parts of an e-mail address

# Full-width digits, letters and signs, and the many dashes, as ASCII; one character each, so that places stay the same.
_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "‐‑‒–—―−－"), ord("-")) | {0x3000: 32}
_LONG_VOWEL = re.compile(r"(?<=\d)ー(?=\d)")  # typed for a dash between digits

_RESERVED = re.compile(
    r"@(?:[\w.-]+\.)?(?:example(?:\.(?:com|org|net|jp|co\.jp|ne\.jp))?|test|invalid|localhost)$|^git@", re.IGNORECASE
)
_HIDDEN = re.compile(  # addresses with a sign or word in the place of @
    r"[A-Za-z0-9][\w.+-]{0,63}\s?(?:[◎☆★■]|[\[({<]\s?(?:at|@|アット(?:マーク)?)\s?[\])}>])\s?"
    r"[A-Za-z0-9-]+(?:\s?(?:\.|[\[({<]\s?(?:dot|\.|ドット)\s?[\])}>])\s?[A-Za-z0-9-]+)+",
    re.IGNORECASE,
)
_HIDES = re.compile(r"[◎☆★■]|[\[({<]\s?(?:at\s?[\])}>]|@|アット)", re.IGNORECASE)
_S = r"[ -]"  # between groups of digits
_JAPAN = (
    rf"0\d{{1,4}}\(\d{{1,4}}\)\d{{4}}|\(?0\d{{1,4}}\)?{_S}?\d{{1,4}}{_S}\d{{4}}"
    rf"|\(0\d{{1,4}}\)\d{{1,4}}-?\d{{4}}|0[789]0{_S}?\d{{4}}{_S}?\d{{4}}"
)
_ABROAD = rf"\+\d{{1,3}}(?:{_S}?\(0\))?(?:{_S}?\(?\d{{1,5}}\)?){{2,5}}"
_AMERICA = r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[.-]\d{4}"
_BRITAIN = r"0\d{3} \d{3} \d{4}|020 \d{4} \d{4}|07\d{3} \d{6}"
_PHONE = re.compile(rf"(?<![\w.+-])(?:{_ABROAD}|{_JAPAN}|{_AMERICA}|{_BRITAIN})(?![\w-]|\.\d)", re.ASCII)
_PHONE_WORDS = re.compile(r"電話|携帯|℡|☎|連絡先|TEL|phone|call|mobile", re.IGNORECASE)
_FREE = re.compile(r"\D*0(?:120|800|570|990)\D*")  # of companies, not of persons
_CARD = re.compile(
    rf"(?<![\w.-])(?:[3-6]\d{{3}}(?:{_S}?\d{{4}}){{3}}|3[47]\d\d{_S}?\d{{6}}{_S}?\d{{5}}|4\d{{12}}(?:\d{{3}})?)(?![\w-]|\.\d)",
    re.ASCII,
)
_CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|3[47]|35|6")
_MY_NUMBER = re.compile(rf"(?<![\w.-])\d{{4}}(?:{_S}?\d{{4}}){{2}}(?![\w-]|\.\d)", re.ASCII)
_MY_NUMBER_WORDS = re.compile(r"マイナンバー|個人番号|my ?number", re.IGNORECASE)

_KANJI_NUMBER = r"[一二三四五六七八九十百千〇]{1,7}"
_BLOCK = (
    rf"(?:(?:\d{{1,5}}|{_KANJI_NUMBER})丁目\s?(?:\d{{1,5}}|{_KANJI_NUMBER})(?:番地?|-)(?:\s?の?(?:\d{{1,5}}|{_KANJI_NUMBER})号?)?(?:-\d{{1,5}})?"
    rf"|(?:\d{{1,5}}|{_KANJI_NUMBER})(?:番地?の?|番)\s?(?:\d{{1,5}}|{_KANJI_NUMBER})?号?"
    r"|\d{1,5}-\d{1,4}(?:-\d{1,4}){0,2}(?:号室)?)"
)
_PREFECTURE = r"(?:北海道|東京都|(?:京都|大阪)府|[\u4e00-\u9fff]{2,3}県)"
_PLACE = r"[\u4e00-\u9fffぁ-んァ-ヶー々]{1,8}?"
_ADDRESS = re.compile(
    rf"(?:{_PREFECTURE}\s?(?:{_PLACE}[市区町村郡]){{1,3}}?|[\u4e00-\u9fff]{{1,5}}市(?:{_PLACE}[区町村])?)"
    rf"\s?[\u4e00-\u9fffぁ-んァ-ヶー々]{{0,12}}?(?:\d{{1,3}}丁目|{_KANJI_NUMBER}条(?:通)?)?\s?{_BLOCK}(?![\d/:.年月日時])"
)
_POSTAL = re.compile(r"〒\s?\d{3}-?\d{4}(?!\d)")


class Finding(NamedTuple):
    """A piece of personal information: its kind and place in the text."""

    kind: str
    start: int
    stop: int


def make_finder() -> Callable[[str], list[Finding]]:
    """A function that finds all personal information of a text, in order, without overlaps."""
    hojichar = require("hojichar.filters.document_filters", "filters: pii")
    patterns = hojichar.MaskPersonalInformation()

    def find(text: str) -> list[Finding]:
        plain = _LONG_VOWEL.sub("-", text.translate(_WIDTH))
        result: list[Finding] = []
        for finding in (
            *_emails(plain, patterns.email_pat),
            *_cards(plain),
            *_my_numbers(plain),
            *_postal_codes(plain),
            *_addresses(plain),
            *_phones(plain, patterns.phone_pat),
        ):
            if all(finding.stop <= other.start or other.stop <= finding.start for other in result):
                result.append(finding)
        return sorted(result, key=lambda finding: finding.start)

    return find


def mask(text: str, findings: list[Finding], counts: collections.Counter[str]) -> str:
    """The text with a label in the place of each finding, in the language of the text; counts them by kind."""
    if not findings:
        return text
    column = 0 if JAPANESE.search(text) else 1
    pieces, end = [], 0
    for finding in findings:
        pieces += [text[end : finding.start], LABELS[finding.kind][column]]
        end = finding.stop
        counts[finding.kind] += 1
    return "".join([*pieces, text[end:]])


def _emails(text: str, pattern: re.Pattern[str]) -> Iterator[Finding]:
    for match in _HIDDEN.finditer(text) if _HIDES.search(text) else ():
        yield Finding("email", match.start(), match.end())
    for sign in re.finditer("@", text):  # within the length of an address, since the pattern takes the square of a text's
        start = max(0, sign.start() - LOCAL_PART)
        for match in pattern.finditer(text[start : sign.end() + DOMAIN]):
            address = match[0].rstrip(".-")
            first = start + match.start() + len(address) - len(address.lstrip(".'`*/={|}"))
            last = start + match.start() + len(address)
            if first <= sign.start() < last and "/" not in address and not _RESERVED.search(text[first:last]):
                yield Finding("email", first, last)


def _phones(text: str, hojichar_pattern: re.Pattern[str]) -> Iterator[Finding]:
    for match in _PHONE.finditer(text):
        digits = _digits(match[0])
        if not _FREE.match(match[0]) and _is_phone(match[0], digits):
            yield Finding("phone", match.start(), match.end())
    for match in hojichar_pattern.finditer(text):  # without dashes a fixed line looks like any number: a word must be near
        near = text[max(0, match.start() - 12) : match.start()]
        alone = not text[match.start() - 1 : match.start()].isdigit() and not text[match.end() : match.end() + 1].isdigit()
        if alone and _PHONE_WORDS.search(near) and not _FREE.match(match[0]):
            yield Finding("phone", match.start(), match.end())


def _is_phone(text: str, digits: str) -> bool:
    if text.startswith("+"):
        return 9 <= len(digits) <= 15
    if not digits.startswith("0"):
        return len(digits) in (10, 11)  # America's
    mobile = digits[:3] in ("050", "060", "070", "080", "090")
    return len(digits) == 11 if mobile else len(digits) == 10 or bool(re.fullmatch(_BRITAIN, text))


def _cards(text: str) -> Iterator[Finding]:
    for match in _CARD.finditer(text):
        digits = _digits(match[0])
        if _CARD_PREFIX.match(digits) and luhn(digits):
            yield Finding("card", match.start(), match.end())


def _my_numbers(text: str) -> Iterator[Finding]:
    for match in _MY_NUMBER.finditer(text):
        near = text[max(0, match.start() - 30) : match.end() + 10]
        if my_number_check(_digits(match[0])) and _MY_NUMBER_WORDS.search(near):
            yield Finding("my_number", match.start(), match.end())


def _postal_codes(text: str) -> Iterator[Finding]:
    return (Finding("postal_code", match.start(), match.end()) for match in _POSTAL.finditer(text))


def _addresses(text: str) -> Iterator[Finding]:
    if not any(sign in text for sign in "市区町村郡"):
        return
    for match in _ADDRESS.finditer(text):
        yield Finding("address", match.start(), match.end())


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number is right."""
    values = [int(digit) * (2 if i % 2 else 1) for i, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in values) % 10 == 0


def my_number_check(digits: str) -> bool:
    """Whether the check digit of a My Number (12 digits) is right, as the ministerial order of 2014 has it."""
    if len(digits) != 12 or len(set(digits)) == 1:
        return False
    weights = [i + 1 if i <= 6 else i - 5 for i in range(1, 12)]
    remainder = sum(int(digit) * weight for digit, weight in zip(reversed(digits[:11]), weights, strict=True)) % 11
    return int(digits[11]) == (0 if remainder <= 1 else 11 - remainder)
