"""What a client is told when a request cannot be served.

One exception carries the HTTP status, a message that says what to change, and a code for programs;
its body has the form that OpenAI's clients turn into their own exceptions.
"""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused or failed.

    Args:
        message: What was wrong and what to change.
        status: HTTP status.
        code: A word for programs.
        param: The field of the request, where it is one.
        retry_after_s: When to come back, where that helps.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after_s = retry_after_s

    @classmethod
    def internal(cls) -> RequestError:
        """Return what is told of a fault of the server's own."""
        why = "the server failed on this request; its log says why"
        return cls(why, status=500, code="internal")

    @classmethod
    def unavailable(cls, why: str) -> RequestError:
        """Return what is told while a server ends."""
        return cls(why, status=503, code="unavailable", retry_after_s=5)

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class Cancelled(Exception):
    """The client left, or the server is going down; nobody waits for the answer."""
