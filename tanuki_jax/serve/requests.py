"""Requests of clients, checked: the openai package's types, and what of them this server supports."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from tanuki_jax.config.ranges import MIN_P, REPETITION_PENALTY, SEED, Range
from tanuki_jax.data import chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.model import Sampling
from tanuki_jax.serve.errors import ApiError
from tanuki_jax.serve.jobs import TOP, Job
from tanuki_jax.serve.prompts import Prompt, read_conversation, read_prompts

MAX_ROWS = 128  # of one request: prompts x n
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
GREEDY = 1e-3  # temperatures below are 0

RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, open="low"),
    "min_p": MIN_P,
    "top_k": Range(0, 2**24, besides=-1),
    "repetition_penalty": REPETITION_PENALTY,
    "n": Range(1, MAX_ROWS),
    "best_of": Range(1, MAX_ROWS),
    "seed": SEED,
    "max_tokens": Range(0, 2**31 - 1),
    "max_completion_tokens": Range(0, 2**31 - 1),
    "top_logprobs": Range(0, TOP),
    "logprobs": Range(0, TOP),
}
# Fields that change nothing here, and that clients send.
IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "verbosity", "reasoning_effort", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
# Fields that are refused unless they ask for what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
}
INSTEAD = {name: "; repetition_penalty is supported" for name in ("frequency_penalty", "presence_penalty")}


class Extra(TypedDict, total=False):
    """Fields that OpenAI does not have, named as vLLM names them."""

    top_k: Optional[int]  # noqa: UP045 - read at run time, beside openai's own
    min_p: Optional[float]  # noqa: UP045
    repetition_penalty: Optional[float]  # noqa: UP045
    stop_token_ids: Optional[list[int]]  # noqa: UP045
    ignore_eos: Optional[bool]  # noqa: UP045
    stream: Optional[bool]  # noqa: UP045


@with_config(ConfigDict(extra="forbid"))
class ChatRequest(chat_params.CompletionCreateParamsBase, Extra, total=False):
    """POST /v1/chat/completions."""


@with_config(ConfigDict(extra="forbid"))
class CompletionRequest(completion_params.CompletionCreateParamsBase, Extra, total=False):
    """POST /v1/completions."""


CHAT, COMPLETION = TypeAdapter(ChatRequest), TypeAdapter(CompletionRequest)


@dataclass(frozen=True)
class ServedModel:
    """The model that is served, as far as requests need to know."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int  # ids that prompts may hold
    max_length: int  # tokens of a prompt and its answer


@dataclass(frozen=True)
class Request:
    """A request that is in order.

    jobs: in the order of the answer's choices; `n` for each prompt.
    """

    prompts: tuple[Prompt, ...]
    jobs: tuple[Job, ...]
    stream: bool
    include_usage: bool
    echo: bool = False


def read_json(body: bytes) -> dict[str, Any]:
    """The object of a body."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def read_chat(served: ServedModel, body: Mapping[str, Any]) -> Request:
    """A chat's request."""
    fields = _check_fields(CHAT, served, body, "messages", [{"role": "user", "content": ""}])
    prompt = read_conversation(served.tokenizer, body.get("messages"), served.max_length)
    if fields.get("top_logprobs") is not None and not fields.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    if None not in (fields.get("max_tokens"), fields.get("max_completion_tokens")):
        raise ApiError(400, "give max_completion_tokens or max_tokens, not both", "max_tokens")
    limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if limit == 0:
        raise ApiError(400, "max_tokens is 0; it must be at least 1", "max_tokens")
    limit = max(1, served.max_length - len(prompt.ids)) if limit is None else limit
    top = (fields.get("top_logprobs") or 0) if fields.get("logprobs") else None
    return _make_request(served, fields, [prompt], limit, top, echo=False)


def read_completion(served: ServedModel, body: Mapping[str, Any]) -> Request:
    """A completion's request."""
    fields = _check_fields(COMPLETION, served, body, "prompt", "")
    if fields.get("best_of") not in (None, fields.get("n", 1)):
        raise ApiError(400, "best_of is supported where it equals n", "best_of")
    prompts = read_prompts(served.tokenizer, served.vocab_size, body.get("prompt"))
    echo, limit = bool(fields.get("echo")), fields.get("max_tokens", 16)
    if limit == 0 and not echo:
        raise ApiError(400, "max_tokens is 0; it must be at least 1, or echo must be true", "max_tokens")
    return _make_request(served, fields, prompts, limit, fields.get("logprobs"), echo)


def _check_fields(
    adapter: TypeAdapter[Any], served: ServedModel, body: Mapping[str, Any], content: str, stand_in: object
) -> dict[str, Any]:
    """The fields that are no null, checked for type, support and range.  content: the field that is read elsewhere."""
    fields = {name: value for name, value in body.items() if value is not None}
    if content not in fields:
        raise ApiError(400, f"{content} is missing", content)
    for name, allowed in NEUTRAL.items():
        if name in fields and not any(fields[name] == value for value in allowed):
            raise ApiError(400, f"{name} is not supported by this server{INSTEAD.get(name, '')}", name)
    stops = _read_stops(fields.pop("stop", None))
    fields = {name: value for name, value in fields.items() if name not in NEUTRAL and name not in IGNORED}
    try:
        fields = dict(adapter.validate_python({**fields, content: stand_in}))
    except ValidationError as error:
        raise _describe(error) from error
    if fields["model"] != served.name:
        raise ApiError(
            404, f"the model {fields['model'][:200]!r} is not here; it is {served.name!r}", "model", "model_not_found"
        )
    for name, allowed_range in RANGES.items():
        value = fields.get(name)
        if value is not None and not isinstance(value, bool) and value not in allowed_range:
            raise ApiError(400, f"{name} is {str(value)[:40]}; it must be {allowed_range.describe()}", name, "out_of_range")
    return {**fields, "stop": stops}


def _describe(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its path."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(part)[:60] for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"the field {path} is unknown to this server; leave it out", path, "unknown_field")
    if not path:
        return ApiError(400, "the name of a field is no valid Unicode text")
    return ApiError(400, f"{path}: {first['msg'][:300]}" if first["type"] != "missing" else f"{path} is missing", path)


def _read_stops(value: object) -> tuple[str, ...]:
    """Stop strings; empty ones and nulls count for nothing."""
    stops = value if isinstance(value, list) else [value]
    texts = [stop for stop in stops if isinstance(stop, str) and stop]
    if not all(stop is None or isinstance(stop, str) for stop in stops):
        raise ApiError(400, "stop must be a text or a list of texts", "stop")
    if len(texts) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in texts):
        raise ApiError(400, f"stop: at most {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters", "stop")
    return tuple(texts)


def _make_request(
    served: ServedModel, fields: Mapping[str, Any], prompts: list[Prompt], limit: int, top: int | None, echo: bool
) -> Request:
    n = fields.get("n", 1)
    if n * len(prompts) > MAX_ROWS:
        raise ApiError(400, f"{len(prompts)} prompts x n {n} are more than {MAX_ROWS} rows; send several requests", "n")
    for number, prompt in enumerate(prompts):
        _check_length(served, prompt, limit, f"prompt {number + 1}" if len(prompts) > 1 else "the prompt")
    seed = fields.get("seed")
    job = Job(
        prompt=(),
        sampling=_read_sampling(served, fields, limit),
        seed=random.getrandbits(31) if seed is None else seed,
        stop_texts=fields["stop"],
        top=top,
        score_prompt=echo and top is not None,
        streams=bool(fields.get("stream")),
    )
    jobs = [replace(job, prompt=p.ids, n_added=p.n_added, sample=sample) for p in prompts for sample in range(n)]
    include_usage = bool((fields.get("stream_options") or {}).get("include_usage"))
    return Request(tuple(prompts), tuple(jobs), job.streams, include_usage, echo)


def _check_length(served: ServedModel, prompt: Prompt, limit: int, subject: str) -> None:
    """An error where prompt and answer do not fit."""
    total = len(prompt.ids) + limit
    if total > served.max_length:
        raise ApiError(
            400,
            f"{subject} has {len(prompt.ids)} tokens and the answer may have {limit}: {total} in all, but this server takes "
            f"{served.max_length}",
            "max_tokens" if len(prompt.ids) < served.max_length else "prompt",
            "context_length_exceeded",
        )


def _read_sampling(served: ServedModel, fields: Mapping[str, Any], limit: int) -> Sampling:
    ids = set(fields.get("stop_token_ids") or ())
    if not fields.get("ignore_eos"):
        ids.update(chat.stop_ids(served.tokenizer))

    def read(name: str, default: float) -> float:
        value = fields.get(name)
        return default if value is None else float(value)

    temperature = read("temperature", 1.0)
    return Sampling(
        max_new_tokens=limit,
        temperature=temperature if temperature >= GREEDY else 0.0,
        top_p=max(1e-6, read("top_p", 1.0)),
        stop=tuple(sorted(ids)),
        top_k=max(0, int(read("top_k", 0))),
        min_p=read("min_p", 0.0),
        repetition_penalty=read("repetition_penalty", 1.0),
    )
