"""What a client is told when a request is not served: a status, the field, and what was expected of it."""

from __future__ import annotations

import math
from typing import Any

import orjson

_TYPES = {
    401: "unauthorized",
    404: "not_found",
    405: "not_found",
    408: "timeout",
    413: "validation",
    429: "overloaded",
    500: "internal",
    503: "unhealthy",
    504: "timeout",
}
_OPENAI = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}


class Refused(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        message: one line.
        field: of the body, as a path: "inputs[3]"; None where no field is at fault.
        retry_after: seconds; None: trying again changes nothing.
        allow: the methods that the route takes; None: the method is not at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        retry_after: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message if field is None else f"{field}: {message}")
        self.status, self.field, self.retry_after, self.allow = status, field, retry_after, allow

    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 408 or (self.status, self.field) == (413, "body"):  # some of it may not have been read
            headers["connection"] = "close"
        if self.allow is not None:
            headers["allow"] = self.allow
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self, path: str) -> bytes:
        """In the form that the clients of a path read."""
        if path.startswith("/v1/"):
            kind = _OPENAI.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
            code = "model_not_found" if self.status == 404 and self.field == "model" else None
            error: dict[str, Any] = {"message": str(self), "type": kind, "param": self.field, "code": code}
            return orjson.dumps({"error": error})
        return orjson.dumps({"error": str(self), "error_type": _TYPES.get(self.status, "validation")})
