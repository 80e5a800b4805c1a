"""Rule-made bilingual data: documents, flattened dialogues, dialogues, preference pairs, and held-out prompts.

The original team used such data for arithmetic (`rule-based/generate_arithmetic_qa_by_rules.py` in its repository); here it
is the default, so that the demo needs no download.  Row i of a split is a pure function of (seed, split, i).  A hash alone
decides what is held out, so no training split can contain it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from tanuki_jax.synth.families import EN, FAMILIES, FOLLOW_UPS, JA, LANGUAGES, Content, Family

HELD_OUT_CONTENTS = 12  # one content in this many is held out,
HELD_OUT_PROMPTS = 6  # and one prompt in this many of the families whose contents must be known
SPLITS = ("documents_ja", "documents_en", "synthetic_ja", "synthetic_en", "dialogues", "pairs")
PROMPTS = "prompts"  # a split of questions without their last answer, which a model is asked for (seeds.py)
Row: TypeAlias = dict[str, Any]  # one line of a JSONL file
Messages: TypeAlias = list[dict[str, str]]

EVASIONS = {JA: "わかりません。", EN: "I do not know."}


@dataclass(frozen=True)
class Question:
    """One question with its answer, a plausible wrong answer, and the turns before it."""

    family: str
    lang: str
    content: Content
    prompt: str
    answer: str
    wrong: str


def _one_in(text: str, share: int) -> bool:
    """Whether the hash of a text picks it, as it does one text in `share`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % share == 0


def content_held_out(family: Family, content: Content) -> bool:
    """Whether no training row may use this content, in any phrasing or language."""
    return family.held_out_key is not None and _one_in(family.held_out_key(content), HELD_OUT_CONTENTS)


def held_out(family: Family, content: Content, prompt: str) -> bool:
    """Whether a prompt belongs to the held-out set."""
    if family.held_out_key is None:
        return _one_in(f"{family.name} {prompt}", HELD_OUT_PROMPTS)
    return content_held_out(family, content)


def draw(rng: Random, family: Family, lang: str, want_held_out: bool) -> Question:
    """A random question of a family, from the training side or from the held-out side."""
    while True:
        content = family.draw(rng)
        prompt = family.prompt(content, lang, rng.randrange(len(family.ask[lang])))
        if held_out(family, content, prompt) == want_held_out:
            return Question(family.name, lang, content, prompt, family.answer(content, lang), family.wrong(rng, content, lang))


def follow_up(rng: Random, first: Question) -> Question | None:
    """A second question that needs the first, or None where the family has none."""
    options = [f for f in FOLLOW_UPS if first.family in f.after and (f.asks != first.family or f.slots(first.content, JA))]
    if not options:
        return None
    chosen = rng.choice(options)
    family, content, lang = FAMILIES[chosen.asks], chosen.content(rng, first.content), first.lang
    prompt = rng.choice(chosen.ask[lang]).format(*chosen.slots(content, lang))
    return Question(family.name, lang, content, prompt, family.answer(content, lang), family.wrong(rng, content, lang))


def conversation(rng: Random, lang: str, want_held_out: bool, two_turns: bool) -> list[Question]:
    """One question, or two of which the second refers to the first."""
    [family] = rng.choices(list(FAMILIES.values()), [f.weight for f in FAMILIES.values()])
    first = draw(rng, family, lang, want_held_out)
    second = follow_up(rng, first) if two_turns else None
    return [first] if second is None else [first, second]


def _messages(questions: list[Question]) -> Messages:
    turns = []
    for q in questions:
        turns += [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.answer}]
    return turns


def _document(rng: Random, lang: str) -> str:
    """A few facts stated as prose, all of one or two families."""
    chosen = rng.sample(list(FAMILIES), 2)
    sentences = []
    for _ in range(rng.randint(3, 6)):
        family = FAMILIES[rng.choice(chosen)]
        content = family.draw(rng)
        while content_held_out(family, content):
            content = family.draw(rng)
        sentences.append(family.say(content, lang))
    return ("" if lang == JA else " ").join(sentences)


def rows(split: str, count: int, seed: int) -> Iterator[Row]:
    """The rows of a training split.

    `documents_*` and `synthetic_*` give {"text"}; `dialogues` {"messages"}; `pairs` {"prompt", "chosen", "rejected"}
    as message lists (the columns that TRL reads); `prompts` {"messages"} that end with the user, and the right answer under
    "meta".  Every row names its families under "meta".
    """
    for i in range(count):
        rng = Random(f"{seed} {split} {i}")
        if split.startswith("documents"):
            yield {"text": _document(rng, split[-2:])}
        elif split.startswith("synthetic"):
            yield {"text": _flatten(conversation(rng, split[-2:], False, rng.random() < 0.25))}
        elif split == "dialogues":
            questions = conversation(rng, rng.choice(LANGUAGES), False, rng.random() < 0.25)
            yield {"messages": _messages(questions), "meta": {"families": [q.family for q in questions]}}
        elif split == "pairs":
            yield preference_pair(rng, want_held_out=False)
        elif split == PROMPTS:
            yield _prompt(conversation(rng, rng.choice(LANGUAGES), False, rng.random() < 0.2))
        else:
            raise KeyError(split)


def _prompt(questions: list[Question]) -> Row:
    last = questions[-1]
    return {"messages": _messages(questions)[:-1], "meta": {"family": last.family, "lang": last.lang, "answer": last.answer}}


def _flatten(questions: list[Question]) -> str:
    """A dialogue as plain text under the chat template's headings, as the original put instruction data into pretraining."""
    return "\n\n".join(f"### 指示:\n{q.prompt}\n\n### 応答:\n{q.answer}" for q in questions)


def preference_pair(rng: Random, want_held_out: bool) -> Row:
    """A right answer against a wrong, evasive or other-language one."""
    lang = rng.choice(LANGUAGES)
    questions = conversation(rng, lang, want_held_out, rng.random() < 0.2)
    last = questions[-1]
    fault = rng.choice(("wrong", "wrong", "evasive", "language"))
    rejected = {
        "wrong": last.wrong,
        "evasive": EVASIONS[lang],
        "language": FAMILIES[last.family].answer(last.content, EN if lang == JA else JA),
    }[fault]
    return {
        "prompt": _messages(questions)[:-1],
        "chosen": [{"role": "assistant", "content": last.answer}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "meta": {"family": last.family, "lang": lang, "fault": fault},
    }


def held_out_prompts(count: int, seed: int) -> list[Row]:
    """`count` distinct prompts that no training split contains, the same number of each family and language in turn.

    Rows: {"family", "lang", "messages" (ending with the user), "answer"}.  One in five asks a second question.
    """
    result: list[Row] = []
    used: set[str] = set()
    cells = [(family, lang) for family in FAMILIES.values() for lang in LANGUAGES]
    i = 0
    while len(result) < count:
        family, lang = cells[i % len(cells)]
        rng = Random(f"{seed} held-out {i}")
        i += 1
        first = draw(rng, family, lang, True)
        second = follow_up(rng, first) if rng.random() < 0.2 else None
        questions = [first] if second is None else [first, second]
        messages = _messages(questions)[:-1]
        if str(messages) in used and i < 50 * count:
            continue
        used.add(str(messages))
        result.append({"family": questions[-1].family, "lang": lang, "messages": messages, "answer": questions[-1].answer})
    return result


def held_out_pairs(count: int, seed: int) -> list[Row]:
    """Preference pairs on held-out prompts."""
    return [preference_pair(Random(f"{seed} held-out pair {i}"), want_held_out=True) for i in range(count)]


def code_files() -> list[Path]:
    """The files of code that rule-made rows follow from: where these change, the rows are others."""
    folder = Path(__file__).parent
    return sorted(path for pattern in ("rules.py", "world.py", "families/*.py") for path in folder.glob(pattern))


def correct(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer to a held-out prompt is exactly right (surrounding white space aside)."""
    return answer.strip() == row["answer"]
