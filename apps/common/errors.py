"""Errors that are answers: a sentence for a person, a code for a script, maybe fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class ApplicationError(Exception):
    """The request cannot be done as asked. ``message`` says what happened and what to do."""

    status = 400
    code = "bad_request"

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        status: int = 0,
        fields: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.status = status or self.status
        self.fields = {k: list(v) for k, v in (fields or {}).items()}


class NotAllowed(ApplicationError):
    status = 403
    code = "forbidden"


class NotFound(ApplicationError):
    status = 404
    code = "not_found"


class Conflict(ApplicationError):
    status = 409
    code = "conflict"


class Invalid(ApplicationError):
    status = 422
    code = "invalid"
