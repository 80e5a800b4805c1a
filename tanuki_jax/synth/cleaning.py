"""Cleans what a model says: labels, quotation marks, refusals, another language than the one that was asked for."""

from __future__ import annotations

import re

QUESTIONS = "質問|依頼|問題|問い|設問|指示|書き直した依頼|新しい依頼|利用者|ユーザー|Q|(?:New |Rewritten )?(?:Question|Request|Problem)|Prompt|Instruction|User"
ANSWERS = "回答|答え|解答|応答|アシスタント|Answer|Response|Assistant|Solution"
BEFORE, AFTER = (
    r"[\s*#_【\[(]{0,6}",
    r"\s?\d{0,2}[*_】\])]{0,3}\s?(?:[:：]|(?<=】))[*_]{0,2}",
)  # of a label, bold or in brackets
QUESTION_LABEL = re.compile(rf"\A{BEFORE}(?:{QUESTIONS}){AFTER}", re.IGNORECASE)
ANSWER_LABEL = re.compile(rf"\A{BEFORE}(?:{ANSWERS}|A|AI){AFTER}", re.IGNORECASE)
LEAKED_ANSWER = re.compile(rf"^{BEFORE}(?:{ANSWERS}|模範解答|ヒント|Hint){AFTER}", re.IGNORECASE | re.MULTILINE)
QUOTES = {"「": "」", "『": "』", '"': '"', "“": "”", "'": "'"}
REFUSAL = re.compile(
    r"\A\W{0,3}(?:"
    r"申し訳(?:ありません|ございません)|すみませんが|恐れ入りますが.{0,30}できません|その(?:質問|依頼|ご要望)には(?:お答え|対応)(?:でき|いたしかね)"
    r"|I(?:'|’)?(?: a)?m (?:very )?sorry\b|(?:I apologi[sz]e|Sorry), but|I (?:can(?:not|(?:'|’)t)|am unable to|(?:'|’)?m not able to) (?:help|assist|answer|provide|comply|fulfil)"
    r"|As an AI(?: language)? (?:model|assistant)"
    r")",
    re.IGNORECASE,
)
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u30fc]")
QUOTED = re.compile(r"「[^」\n]*」|『[^』\n]*』|“[^”\n]*”|\"[^\"\n]*\"")
HAN = re.compile(r"[\u3400-\u9fff々]")
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
FEW_LETTERS = 8  # below which a text shows no language


def question(text: str) -> str:
    """A question without its label, the quotation marks around it, and an answer that follows it."""
    text = _unquote(QUESTION_LABEL.sub("", text.strip()))
    answer = LEAKED_ANSWER.search(text)
    if answer and answer.start() > 0:
        text = text[: answer.start()]
    return _unquote(text)


def answer(text: str) -> str:
    """An answer without its label; the rest of it is the model's."""
    return ANSWER_LABEL.sub("", text.strip()).strip()


def _unquote(text: str) -> str:
    """Text without quotation marks that enclose the whole of it."""
    text = text.strip()
    while len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def is_refusal(text: str) -> bool:
    """Whether a model declines to answer."""
    return REFUSAL.match(text.strip()) is not None


def in_language(text: str, language: str) -> bool:
    """Whether a text may be of a language (ja or en), by its letters; code, addresses and quotations aside.

    Japanese needs a kana where it is no short run of kanji; a text with hardly any letters is of every language.
    """
    text = QUOTED.sub("", CODE.sub("", text))
    kana, han, latin = (len(pattern.findall(text)) for pattern in (KANA, HAN, LATIN))
    others = sum(c.isalpha() for c in text) - kana - han - latin
    letters = kana + han + latin + others
    if letters < FEW_LETTERS:
        return others == 0 and (language != "en" or kana + han == 0)
    if language == "ja":
        return kana > 0 and kana + han >= 0.2 * letters and others < 0.3 * letters
    return latin >= 0.7 * letters
