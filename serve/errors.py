"""What can go wrong in the service, and the one table that says how it is answered over HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass

from invar_ray.errors import RequestError

_OPTIONS = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^\s/@'\"]*:[^\s@'\"]*@|[^\s/@'\"]*@)?"  # a secret may hold slashes
    r"([^\s?'\"]*)(?:\?[^\s'\")]*)?"
)


def plain(text: str) -> str:
    """A text in which no URI has credentials or options (``s3://key:secret@..?endpoint=..``):
    what may be logged and shown.
    """
    return _OPTIONS.sub(r"\1\2", text)


class ServiceError(Exception):
    """A failure that the caller may know; its class stands in :data:`TABLE`.

    Args:
        message: for the client; never a stack trace.
        retry_after_s: seconds for the ``Retry-After`` header, if trying again makes sense.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        # Both in ``args``: an exception that comes from another process is rebuilt from them.
        super().__init__(message, retry_after_s)
        self.message, self.retry_after_s = message, retry_after_s

    def __str__(self) -> str:
        return self.message


class Unavailable(ServiceError):
    """Something that the answer needs is not there now."""


class Overloaded(ServiceError):
    """Too many requests wait already."""


class OutOfTime(ServiceError):
    """The request's time is up."""


class Conflict(ServiceError):
    """The index cannot be changed as asked; the one before stays in service."""


class NotFound(ServiceError):
    """Nothing has this name."""


class UnknownModel(ServiceError):
    """No model has this name."""


TABLE: dict[type[Exception], tuple[int, str]] = {
    RequestError: (422, "invalid_request"),
    NotFound: (404, "not_found"),
    UnknownModel: (404, "model_not_found"),
    Conflict: (409, "conflict"),
    Overloaded: (503, "overloaded"),
    Unavailable: (503, "unavailable"),
    OutOfTime: (504, "timeout"),
}
"""HTTP status and code of each error; what is not here is a fault of ours, 500."""

CODES = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
"""Codes of what the web framework refuses by itself, by status; any other is a wrong request."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def openai_type(status: int) -> str:
    """OpenAI's kind of an error with this status."""
    return "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")


@dataclass(frozen=True, slots=True)
class Fault:
    """How an error is answered: status, code, what the caller reads, and when to come back."""

    status: int
    code: str
    message: str
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """By :data:`TABLE`; an error that is not in it tells the caller nothing of its cause."""
        for kind in type(error).__mro__:
            if kind in TABLE:
                status, code = TABLE[kind]
                return cls(status, code, plain(str(error)), getattr(error, "retry_after_s", None))
        return cls(500, "internal", "the service failed; its log has the cause")
