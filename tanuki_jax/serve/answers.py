"""Answers in the openai package's types, as JSON."""

from __future__ import annotations

import abc
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat import chat_completion as whole
from openai.types.chat import chat_completion_chunk as chunk
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from tanuki_jax.serve.jobs import Piece, ScoredToken
from tanuki_jax.serve.requests import Request
from tanuki_jax.serve.spelling import Spelling

FINISH: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


@dataclass
class Answer:
    """What a row has gained so far."""

    text: str = ""
    finish: str = ""
    n_tokens: int = 0
    scored: list[ScoredToken] = field(default_factory=list)
    prompt: list[ScoredToken] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Adds a piece."""
        self.text += piece.text
        self.finish = piece.finish
        self.n_tokens += piece.n_tokens
        self.scored += piece.scored
        self.prompt += piece.prompt


class Writer(abc.ABC):
    """Writes the answer to one request, whole or piece by piece."""

    prefix = ""  # of the answer's id

    def __init__(self, request: Request, spelling: Spelling, model: str) -> None:
        self._request, self._spelling = request, spelling
        self._head: Any = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._n_per_prompt = len(request.jobs) // len(request.prompts)
        self.answers = [Answer() for _ in request.jobs]

    @abc.abstractmethod
    def whole(self) -> str:
        """The whole answer."""

    @abc.abstractmethod
    def begin(self) -> Iterable[str]:
        """The chunks before any piece."""

    @abc.abstractmethod
    def piece(self, index: int, piece: Piece) -> Iterable[str]:
        """The chunks for a piece of the answer with this number."""

    def end(self) -> Iterable[str]:
        """The chunk after all pieces, where usage was asked for."""
        if self._request.include_usage:
            yield self._write_chunk([], self._usage())

    def _chunk(self, choice: Any) -> str:
        return self._write_chunk([choice], None)

    def _write_chunk(self, choices: list[Any], usage: CompletionUsage | None) -> str:
        """A chunk; it has the field of usage, empty or not, where that was asked for."""
        return self._write(choices, {"usage": usage} if self._request.include_usage else {})

    @abc.abstractmethod
    def _write(self, choices: list[Any], usage: dict[str, Any]) -> str: ...

    def _usage(self) -> CompletionUsage:
        prompt, completion = sum(len(p.ids) for p in self._request.prompts), sum(a.n_tokens for a in self.answers)
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class ChatWriter(Writer):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"

    def whole(self) -> str:
        choices = [
            whole.Choice(
                index=index,
                finish_reason=FINISH[answer.finish],
                message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                logprobs=None
                if self._request.jobs[index].top is None
                else whole.ChoiceLogprobs(content=self._logprobs(answer.scored, index), refusal=None),
            )
            for index, answer in enumerate(self.answers)
        ]
        answer = ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=self._usage())
        return answer.model_dump_json(exclude_unset=True)

    def begin(self) -> Iterable[str]:
        for index in range(len(self.answers)):
            yield self._chunk(self._choice(index, chunk.ChoiceDelta(role="assistant", content="")))

    def piece(self, index: int, piece: Piece) -> Iterable[str]:
        if piece.text or piece.scored:
            choice = self._choice(index, chunk.ChoiceDelta(content=piece.text))
            if self._request.jobs[index].top is not None:
                choice.logprobs = chunk.ChoiceLogprobs(content=self._logprobs(piece.scored, index), refusal=None)
            yield self._chunk(choice)
        if piece.finish:
            choice = self._choice(index, chunk.ChoiceDelta())
            choice.finish_reason = FINISH[piece.finish]
            yield self._chunk(choice)

    def _choice(self, index: int, delta: chunk.ChoiceDelta) -> chunk.Choice:
        return chunk.Choice(index=index, delta=delta, finish_reason=None, logprobs=None)

    def _write(self, choices: list[chunk.Choice], usage: dict[str, Any]) -> str:
        answer = ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=choices, **usage)
        return answer.model_dump_json(exclude_unset=True)

    def _logprobs(self, scored: Sequence[ScoredToken], index: int) -> list[ChatCompletionTokenLogprob]:
        spell, top = self._spelling, self._request.jobs[index].top or 0
        return [
            ChatCompletionTokenLogprob(
                token=spell.text(s.token),
                bytes=spell.utf8(s.token),
                logprob=s.logprob or 0.0,
                top_logprobs=[TopLogprob(token=spell.text(i), bytes=spell.utf8(i), logprob=p) for i, p in s.tops[:top]],
            )
            for s in scored
        ]


class CompletionWriter(Writer):
    """Answers of /v1/completions.

    openai's types know no null among log-probabilities, nor a finish_reason of null, so that these are not checked.
    """

    prefix = "cmpl"

    def whole(self) -> str:
        choices = []
        for index, answer in enumerate(self.answers):
            echo = self._echo(index)
            choices.append(self._choice(index, echo + answer.text, answer.prompt, answer.scored, len(echo), answer.finish))
        return self._write(choices, {"usage": self._usage()})

    def begin(self) -> Iterable[str]:
        """Prompts that are echoed without log-probabilities."""
        for index in range(len(self.answers)):
            if (echo := self._echo(index)) and not self._request.jobs[index].score_prompt:
                yield self._chunk(self._choice(index, echo, (), (), 0, ""))

    def piece(self, index: int, piece: Piece) -> Iterable[str]:
        echo = self._echo(index)
        text = echo + piece.text if piece.prompt else piece.text
        yield self._chunk(self._choice(index, text, piece.prompt, piece.scored, len(echo), piece.finish))

    def _echo(self, index: int) -> str:
        return self._request.prompts[index // self._n_per_prompt].text if self._request.echo else ""

    def _write(self, choices: list[CompletionChoice], usage: dict[str, Any]) -> str:
        answer = Completion(**self._head, object="text_completion", choices=choices, **usage)
        return answer.model_dump_json(exclude_unset=True, warnings=False)

    def _choice(
        self,
        index: int,
        text: str,
        prompt: Sequence[ScoredToken],
        scored: Sequence[ScoredToken],
        n_echoed: int,
        finish: str,
    ) -> CompletionChoice:
        logprobs = None
        if self._request.jobs[index].top is not None:
            tokens = [*prompt, *(s._replace(offset=s.offset + n_echoed) for s in scored)]
            logprobs = Logprobs.model_construct(
                tokens=[self._spelling.text(s.token) for s in tokens],
                token_logprobs=[s.logprob for s in tokens],
                top_logprobs=[self._tops(s) for s in tokens],
                text_offset=[s.offset for s in tokens],
            )
        return CompletionChoice.model_construct(index=index, text=text, logprobs=logprobs, finish_reason=FINISH.get(finish))

    def _tops(self, scored: ScoredToken) -> dict[str, float] | None:
        """Log-probabilities by the spelling of the tokens; of tokens that are spelt alike the likeliest counts."""
        if scored.logprob is None:
            return None
        tops: dict[str, float] = {}
        for token, logprob in scored.tops:
            tops.setdefault(self._spelling.text(token), logprob)
        return tops
