"""Weekdays and months before and after, counted one by one."""

from __future__ import annotations

from random import Random

from tanuki_jax.synth import world
from tanuki_jax.synth.families.family import EN, JA, Content, Family, in_language, side

CYCLES = {"weekday": world.WEEKDAYS, "month": world.MONTHS}


def _draw(rng: Random) -> Content:
    kind = rng.choice(("weekday", "weekday", "month"))
    return kind, rng.randrange(len(CYCLES[kind])), rng.choice((-1, 1)) * rng.randint(1, 4)


def _slots(content: Content, lang: str) -> tuple[str, ...]:
    kind, start, shift = content
    name, n = CYCLES[kind][start][side(lang)], abs(shift)
    if lang == JA:
        return (f"{name}の{n}{'日' if kind == 'weekday' else 'か月'}{'後' if shift > 0 else '前'}",)
    return (f"{n} {'day' if kind == 'weekday' else 'month'}{'s' if n > 1 else ''} {'after' if shift > 0 else 'before'} {name}",)


def _answer(content: Content, lang: str) -> str:
    kind, start, shift = content
    names, sign = CYCLES[kind], 1 if shift > 0 else -1
    steps = [(n, names[(start + sign * n) % len(names)][side(lang)]) for n in range(1, abs(shift) + 1)]
    if lang == JA:
        unit = ("日" if kind == "weekday" else "か月") + ("後" if shift > 0 else "前")
        return "、".join(f"{n}{unit}は{name}" for n, name in steps) + "です。"
    return ", ".join(f"{n}: {name}" for n, name in steps) + "."


def _wrong(rng: Random, content: Content, lang: str) -> str:
    kind, start, shift = content
    return _answer((kind, start + rng.choice((-2, -1, 1, 2)), shift), lang)


def _say(content: Content, lang: str) -> str:
    [subject] = _slots(content, lang)
    return in_language(lang, f"{subject}を数えます。", f"We count {subject}: ") + _answer(content, lang)


CALENDAR = Family(
    "calendar",
    _draw,
    {
        JA: ("{}はいつですか。", "{}は何ですか。", "{}を教えてください。", "{}を答えてください。", "{}はいつになりますか。", "質問です。{}はいつでしょうか。"),
        EN: ("What comes {}?", "Tell me what comes {}.", "What is {}?", "Please say what is {}.", "Do you know what comes {}?", "A question: what is {}?"),
    },
    _slots,
    _answer,
    _wrong,
    _say,
    weight=1.5,
)  # fmt: skip
