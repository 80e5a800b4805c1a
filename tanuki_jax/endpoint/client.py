"""The one place that sends requests to a model's server."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tanuki_jax.config.addresses import check_base_url
from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint import reply
from tanuki_jax.endpoint.job import Answer, Job, Overflow, seed_of
from tanuki_jax.endpoint.reply import Failure
from tanuki_jax.errors import UserError

if TYPE_CHECKING:
    from openai import APIStatusError

MAX_REQUESTS = 1000  # connections that the openai client opens at most
START_SECONDS = 30.0  # for the list of models
MAX_MESSAGE = 300  # characters of a server's message that are shown


class Client:
    """An endpoint's server, from `start` (or `async with`) to `close`.

    name: of the endpoint in the recipe, for messages.
    """

    def __init__(self, endpoint: Endpoint, name: str = "") -> None:
        self.endpoint = endpoint  # with the model's name, once it is known
        self.label = (
            f"endpoint {name} ({endpoint.base_url})" if name not in ("", endpoint.base_url) else f"endpoint {endpoint.base_url}"
        )
        self._key = ""
        self._openai: Any = None

    async def __aenter__(self) -> Client:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Checks that the server answers, takes the key and has the model.

        Raises:
          UserError: it does not.
        """
        import openai

        if self._openai:
            return
        self._key = self._read_key()
        self._openai = openai.AsyncOpenAI(
            base_url=self.endpoint.base_url,
            api_key=self._key or "none",  # else the client would look for another provider's key
            max_retries=0,
            timeout=self.endpoint.timeout_seconds,
        )
        try:
            await self._check_model()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Closes the connections."""
        if self._openai:
            await self._openai.close()
            self._openai = None

    async def ask(self, job: Job, job_id: str) -> Answer:
        """Sends one request.

        Raises:
          Failure: there is no answer; another try may have one.
          NoAnswer: there will be none.
          UserError: no request to this endpoint can succeed.
        """
        settings = job.settings(self.endpoint)
        body: dict[str, Any] = {"model": self.endpoint.model, "seed": seed_of(job_id), **settings}
        if job.prompt:
            body["prompt"] = job.prompt
        else:
            body["messages"] = list(job.messages)
            if "logprobs" in settings:
                body |= {"logprobs": True, "top_logprobs": settings["logprobs"]}
        value = await self._send("post", "/completions" if job.prompt else "/chat/completions", body)
        return reply.read(value)

    def set_model(self, name: str) -> None:
        """Names the model of an endpoint that names none; `start` checks that it is there."""
        self.endpoint = dataclasses.replace(self.endpoint, model=name)

    async def _check_model(self) -> None:
        try:
            value = await self._send("get", "/models", seconds=START_SECONDS)
        except Failure as failure:
            if failure.kind == "not_there" and self.endpoint.model:
                return  # a server without a list of models; the first job shows whether it has this one
            fix = {
                "unreachable": "start its server, or correct base_url",
                "not_there": "base_url usually ends in /v1",
            }.get(failure.kind, "look at its server, and run the same command again")
            raise UserError(f"{self.label}: {failure}; {fix}") from failure
        names = reply.model_names(value)
        if names is None:
            raise UserError(f"{self.label}: /models answers, but with no list of models; base_url usually ends in /v1")
        if not self.endpoint.model:
            if len(names) != 1:
                raise UserError(f"{self.label}: it has {_listing(names)}; name one of them as `model`")
            self.set_model(names[0])
        elif self.endpoint.model not in names:
            raise UserError(f"{self.label}: it has no model {self.endpoint.model!r}; it has {_listing(names)}")

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float | None = None
    ) -> object:
        """What a server answers with status 200: JSON, or text where it calls it so."""
        import openai

        seconds = seconds or self.endpoint.timeout_seconds
        headers = {} if self._key else {"Authorization": openai.Omit()}
        options = {"headers": headers, "timeout": seconds}
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):  # openai's own is for each piece of an answer
                if method == "get":
                    return await self._openai.get(path, cast_to=object, options=options)
                return await self._openai.post(path, cast_to=object, body=body, options=options)
        except (TimeoutError, openai.APITimeoutError) as error:
            if _connecting(error):
                raise Failure("unreachable", "no connection within the time-out") from error
            raise Failure("time_out", f"no answer within {time.monotonic() - began:.0f} s") from error
        except openai.APIConnectionError as error:
            reason = self._shown(str(error.__cause__ or error))
            if _connecting(error):
                raise Failure("unreachable", f"cannot be reached ({reason})") from error
            raise Failure("cut_body", f"the connection broke off ({reason})") from error
        except openai.APIStatusError as error:
            raise self._status_error(error, path) from error
        except (ValueError, RecursionError) as error:
            raise Failure("bad_json", f"the answer is no JSON ({self._shown(str(error))})") from error

    def _status_error(self, error: APIStatusError, path: str) -> Exception:
        """The meaning of an HTTP status."""
        status = error.status_code
        text = self._shown(reply.error_message(error.body) or error.response.text)
        message = f"HTTP {status}: {text}"
        if status in (401, 403):
            name = self.endpoint.api_key_env
            fix = f"the key in ${name} is refused" if name else "it wants a key; name its environment variable as api_key_env"
            return UserError(f"{self.label}: {fix} ({message})")
        if status == 404:
            if path == "/models":
                return Failure("not_there", message)
            return UserError(f"{self.label}: {path} or the model {self.endpoint.model!r} is not there ({message})")
        if status == 429 and error.code == "insufficient_quota":
            return UserError(f"{self.label}: its account has no money left ({message})")
        if status in (400, 413, 422) and reply.is_overflow(f"{error.code} {text}"):
            return Overflow("overflow", {"message": text})
        kinds = {408: "busy", 409: "busy", 425: "busy", 429: "rate_limit"}
        kind = kinds.get(status, "server_error" if status >= 500 else "bad_request")
        return Failure(kind, message, retry_after(error.response.headers))

    def _read_key(self) -> str:
        """The key of the environment; it goes into the request's header and nowhere else."""
        name = self.endpoint.api_key_env
        check_base_url("endpoints: base_url", self.endpoint.base_url)
        key = os.environ.get(name, "").strip() if name else ""
        if name and not key:
            raise UserError(f"{self.label}: the environment variable {name} (api_key_env) is not set")
        if not key.isascii() or not key.isprintable():
            raise UserError(f"{self.label}: the key in ${name} has characters that no key has")
        return key

    def _shown(self, text: str) -> str:
        """A server's message in one line, without the key."""
        text = " ".join(text.split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait for; None where it says nothing."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            date = email.utils.parsedate_tz(value)
            if date:
                return max(0.0, email.utils.mktime_tz(date) - time.time())
    return None


def _connecting(error: BaseException | None) -> bool:
    """Whether a request failed before it was sent."""
    while error:
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            return True
        error = error.__cause__
    return False


def _listing(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
