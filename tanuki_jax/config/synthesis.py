"""The schema's groups about rows that models make: endpoints, filters, and what is asked (docs/synthetic_data.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tanuki_jax.config.keys import key
from tanuki_jax.config.ranges import AMOUNT, COUNT, SHARE, TEMPERATURE, TOP_P, Range

PRICE = Range(0, 1e6)
PII = ("none", "mask", "drop")
LANGUAGES = ("ja", "en")
SYNTH_PREFIX = "synth:"  # begins the files of a source, or of seeds, that are rows of a group in `synth`
RULES_PREFIX = "rules:"  # of those that rules make
BUILTIN_PREFIX = "builtin:"  # of seeds that are a list of ours
BETTER, JUDGE, RULES = "better", "judge", "rules"  # who decides which answer of a pair is chosen; the first two are endpoints


class Method(NamedTuple):
    """What a method needs and gives: the kinds of its seeds, and what its rows are trained as."""

    seeds: tuple[str, ...]
    gives: str


DIALOGUES, DOCUMENTS, PAIRS = "dialogues", "documents", "pairs"
METHODS: Mapping[str, Method] = {
    "answer": Method(("prompts",), DIALOGUES),
    "persona": Method(("personas", "tasks"), DIALOGUES),
    "topic": Method(("topics",), DIALOGUES),
    "rewrite": Method(("documents",), DOCUMENTS),
    "magpie": Method((), DIALOGUES),
    "evol": Method(("prompts",), DIALOGUES),
    "preferences": Method(("prompts",), PAIRS),
}


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible server: `tanuki serve`, vLLM, or a provider."""

    base_url: str = key(
        "", "address of the API, http://127.0.0.1:8000/v1; empty = that of the model of a synth stage", resumable=True
    )
    model: str = key("", "name of the model there; empty = the only one that it lists")
    api_key_env: str = key("", "environment variable that holds the key; empty = none is sent", resumable=True)
    license: str = key("", "licence of what the model writes (apache-2.0, ...); every row records it")
    temperature: float = key(0.7, "0 = the likeliest token", TEMPERATURE)
    top_p: float = key(1.0, "share of the probability that is sampled from", TOP_P)
    max_tokens: int = key(512, "longest answer", COUNT)
    repetition_penalty: float = key(1.0, "of tokens that are there already; sent where it is not 1", Range(0.01, 100))
    concurrency: int = key(16, "requests under way at one time", Range(1, 10_000), resumable=True)
    timeout_seconds: float = key(120.0, "after which a request has failed", Range(0.1, 86_400), resumable=True)
    retries: int = key(6, "tries after the first one, with growing pauses", Range(0, 100), resumable=True)
    input_price: float = key(0.0, "of a million prompt tokens, in any currency", PRICE, resumable=True)
    output_price: float = key(0.0, "of a million answer tokens, in the same currency", PRICE, resumable=True)


@dataclass(frozen=True)
class Filters:
    """What is dropped of rows before they are trained on; every drop is counted by its reason, and written to a file."""

    language: str = key("", "ja or en: rows in another language are dropped; empty = any")
    min_characters: int = key(0, "of a document, or of each answer; less is dropped", AMOUNT)
    max_characters: int = key(0, "of a document, or of each answer; more is dropped; 0 = any", AMOUNT)
    repetition: bool = key(False, "drop what repeats itself: characters, lines, n-grams (the paper's thresholds)")
    leaks: bool = key(False, "drop answers with parts of their prompt's instructions or an assistant's stock phrases")
    pii: str = key("none", "personal information is left (none), masked (mask), or its rows dropped (drop)")
    near_duplicates: float = key(0.0, "drop all but the first of rows of this Jaccard similarity (5-grams); 0 = off", SHARE)
    evaluation: str = key("", "globs of prompts of evaluations; rows that contain one are dropped")
    evaluation_ngram: int = key(13, "characters (ja) or words (en) in a row that count as containing one", COUNT)
    min_quality: float = key(0.0, "Ask-LLM: least probability that the judge calls a row useful; 0 = off", SHARE)
    dependent_turns: bool = key(False, "drop dialogues whose later questions, the judge finds, do not need the first")
    judge: str = key("", "name in `endpoints`, for min_quality and dependent_turns")


@dataclass(frozen=True)
class Synth:
    """Rows that a model makes from seeds: documents, dialogues or preference pairs."""

    method: str = key("answer", "answer, persona, topic, rewrite, magpie, evol or preferences (docs/synthetic_data.md)")
    seeds: dict[str, str] = key(
        dict, "personas, tasks, topics, documents or prompts -> files, builtin:NAME, rules:prompts or synth:NAME"
    )
    language: str = key("ja", "ja or en: of the templates, and of what is asked for")
    items: int = key(0, "rows to ask for, drawn from all combinations of seeds; 0 = every one", AMOUNT)
    turns: int = key(2, "persona, topic: questions of a dialogue", Range(1, 100))
    styles: tuple[str, ...] = key((), "rewrite: styles that each document is written in; empty = all")
    rounds: int = key(1, "evol: times that a prompt is made harder", Range(1, 100))
    samples: int = key(2, "preferences: answers to each prompt", Range(2, 1000))
    templates: str = key("", "TOML file of templates in place of ours; empty = ours")
    generator: str = key(
        "", "name in `endpoints` of the model that writes; empty = that of a synth stage, with default sampling"
    )
    better: str = key("", "preferences: name in `endpoints` whose answer is chosen over the generator's, without a judge")
    judge: str = key("", "preferences: name in `endpoints`, or rules (the checker of rules:prompts)")
    scores: str = key("", "file of scores by category, or a stage of the recipe: items are drawn from the weakest alone")
    weakest: int = key(3, "categories that count as weak", COUNT)
    filters: str = key("", "name in `filters`, for the rows that come out")
    max_calls: int = key(0, "budget in requests; 0 = none", AMOUNT, resumable=True)
    max_tokens: int = key(0, "budget in tokens of prompts and answers; 0 = none", Range(0, 10**15), resumable=True)
    max_cost: float = key(0.0, "budget in the currency of the prices; 0 = none", Range(0, 1e12), resumable=True)


def decider(synth: Synth) -> str:
    """Who decides about pairs: BETTER, RULES, or JUDGE; empty for a method that makes no pairs."""
    if METHODS[synth.method].gives != PAIRS:
        return ""
    return BETTER if synth.better else RULES if synth.judge == RULES else JUDGE


def has_prices(endpoints: Iterable[Endpoint]) -> bool:
    """Whether money is counted for any of them."""
    return any(endpoint.input_price or endpoint.output_price for endpoint in endpoints)


def roles(synth: Synth) -> dict[str, str]:
    """Role -> name in `endpoints` of the models that are asked; an empty generator is the model of a synth stage."""
    return {"generator": synth.generator} | {
        role: name for role, name in ((BETTER, synth.better), (JUDGE, synth.judge)) if role == decider(synth)
    }
