"""What goes wrong with a request, in OpenAI's shape."""

from __future__ import annotations

import json

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class ApiError(Exception):
    """A request that gets no answer.

    Args:
      status: of HTTP.
      param: the field of the request that is wrong, if it is one.
      code: a word that programs can compare.
      retry_after: seconds after which another try makes sense; 0 = not said.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> str:
        """JSON in ASCII: the message may quote text that is no valid Unicode."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else TYPES.get(self.status, fallback)
        return json.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers


def stopping() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is stopping; ask another one, or try again later", code="stopping", retry_after=5)
