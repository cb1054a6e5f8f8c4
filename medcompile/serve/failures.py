"""Errors as a client sees them: OpenAI's shape {"error": {message, type, param, code}} and an HTTP status.

What went wrong inside is told by its kind alone: messages go out only of errors that this project raises on purpose,
which name positions and limits, and never a text that was sent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from medcompile import errors
from medcompile.errors import CacheFull, InputError, MedcompileError, ProfileError, UsageError


class ServeError(MedcompileError):
    """An error that has its own status. retry_after_s: when trying again may help; None where it can't."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, fix: str = "", param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, fix=fix)
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(ServeError):
    status, kind = 400, "invalid_request_error"


class NotSupported(BadRequest):
    code = "unsupported_parameter"


class ModelNotFound(ServeError):
    status, kind, code = 404, "invalid_request_error", "model_not_found"


class TooLarge(ServeError):
    status, kind, code = 413, "invalid_request_error", "request_too_large"


class QueueFull(ServeError):
    status, kind, code = 429, "rate_limit_error", "queue_full"


class WorkerDown(ServeError):
    """The model's process died or is being started again."""

    status, kind, code = 503, "server_error", "model_unavailable"


class Draining(ServeError):
    status, kind, code = 503, "server_error", "server_stopping"


class DeadlinePassed(ServeError):
    status, kind, code = 504, "server_error", "deadline_passed"


class Fault(ServeError):
    """A bug, ours or a library's. Nothing of it is told but that it happened."""

    status, kind, code = 500, "server_error", "internal_error"


_STATUS: Mapping[type[MedcompileError], tuple[int, str]] = {  # the first that fits
    InputError: (400, "invalid_input"),
    ProfileError: (400, "shape_not_supported"),
    CacheFull: (400, "context_length_exceeded"),
    UsageError: (400, "invalid_value"),
}
_OURS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


def status_of(error: BaseException) -> int:
    if isinstance(error, ServeError):
        return error.status
    return next((status for kind, (status, _) in _STATUS.items() if isinstance(error, kind)), 500)


def body_of(error: BaseException) -> dict[str, Any]:
    """What the client reads. An error that is not ours is told as a Fault."""
    if isinstance(error, ServeError):
        return told(_with_fix(error), error.kind, error.param, error.code)
    for kind, (_, code) in _STATUS.items():
        if isinstance(error, kind):
            return told(_with_fix(error), "invalid_request_error", None, code)
    return told("the server failed on this request", Fault.kind, None, Fault.code)


def headers_of(error: BaseException) -> dict[str, str]:
    after_s = error.retry_after_s if isinstance(error, ServeError) else None
    return {} if after_s is None else {"Retry-After": str(max(1, round(after_s)))}


def told(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _with_fix(error: MedcompileError) -> str:
    return f"{error.message} ({error.fix})" if error.fix else error.message


# ---- between the processes


def sent(error: BaseException) -> dict[str, str]:
    """An error as a worker tells it to the server. Of one that is not ours the type alone: its words may be a text."""
    if isinstance(error, MedcompileError):
        return {"type": type(error).__name__, "message": error.message, "fix": error.fix}
    return {"type": "", "message": f"{type(error).__name__} in the worker", "fix": ""}


def rebuilt(sent_error: Mapping[str, str]) -> MedcompileError:
    """The error that a worker told of."""
    kind = _OURS.get(sent_error["type"])
    if kind is None or not issubclass(kind, MedcompileError) or issubclass(kind, errors.RecipeError):
        return Fault(sent_error["message"])
    return kind(sent_error["message"], fix=sent_error["fix"])


# ---- bodies that don't fit their schema


def of_validation(problems: Iterable[Mapping[str, Any]], known: Sequence[str] = ()) -> BadRequest:
    """The first problem of those that pydantic found, without what was sent. known: names of the parameters.

    pydantic's own words may hold a value only in the kinds of problem that are worded anew here.
    """
    first = next(iter(problems))
    kind = str(first["type"])
    path = [part for part in first["loc"] if isinstance(part, int) or part in known or str(part) in _SHOWN]
    param = ".".join(map(str, path)) or None
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see /openapi.json for those that there are"
        return BadRequest("a parameter that this route does not know", fix=hint, param=param)
    if kind in {"json_invalid", "json_type"}:
        return BadRequest("the body is not valid JSON", fix="send one JSON object, in UTF-8", param=None)
    message = _PLAIN.get(kind) or (str(first["msg"]) if kind in _SAFE else "a value of the wrong kind")
    return BadRequest(f"{param or 'body'}: {message}", fix="see /openapi.json", param=param)


_SHOWN = {"content", "role", "text", "type", "json_schema", "schema", "include_usage", "image_url", "url"}
_PLAIN = {
    "missing": "is required",
    "string_unicode": "is not valid text",
    "union_tag_invalid": "is of a kind that is not known here",
    "value_error": "is not what is wanted here",
}
_SAFE = {
    "bool_parsing",
    "bool_type",
    "dict_type",
    "finite_number",
    "float_type",
    "greater_than",
    "greater_than_equal",
    "int_from_float",
    "int_type",
    "less_than",
    "less_than_equal",
    "list_type",
    "literal_error",
    "model_attributes_type",
    "model_type",
    "string_too_long",
    "string_too_short",
    "string_type",
    "too_long",
    "too_short",
}
