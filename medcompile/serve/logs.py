"""Logs as one JSON object a line, which never hold what a client sent.

What makes that true, and not a matter of care at each call:
- The server's own lines are events: a name, and fields of which only the known ones (FIELDS) are written.
- Of other libraries' lines, the wording is kept and the words that they filled in are not (numbers are).
- Of an exception, its type and the places it passed are told, never its message nor a value: either may quote a text.
- The interpreter's own last words (uncaught exceptions, in threads too, and warnings) come here instead of stderr.
Memory images of crashes are private.py's to prevent.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that this task works for; whoever takes a request in sets it."""

FIELDS = frozenset(
    {
        *("method", "route", "status", "seconds", "received_bytes", "sent_bytes", "key", "client", "cut"),
        *("model", "digest", "variant", "target", "worker", "pid", "exit", "attempt", "wait_s", "in_flight", "reason"),
        *("host", "port", "tls", "keys", "bundles", "version", "signal", "requests", "lines", "failed", "error"),
        *("url", "priority", "prompt_tokens", "generated_tokens", "items"),
    }
)
_LONGEST = 200
"""Characters of a field; none of ours is longer, and nothing else should be here."""
_MAIN_PACKAGE = "medcompile"

log = logging.getLogger("medcompile.serve")

Field = str | int | float | bool | None


@dataclass(frozen=True)
class Access:
    """One answered request. route: the path as the route is written. key: the name of the key, not the key.

    cut: the client left before the end of the answer.
    """

    method: str
    route: str
    status: int
    seconds: float
    received_bytes: int
    sent_bytes: int
    key: str = ""
    client: str = ""
    cut: bool = False


def event(name: str, fields: Mapping[str, Field] | None = None, *, level: int = logging.INFO) -> None:
    """Log that something happened. name: words that stand in the source. Fields that are not known are left out."""
    if log.isEnabledFor(level):
        log.log(level, name, extra={"fields": dict(fields or {})})


def access(one: Access) -> None:
    fields = vars(one) | {"seconds": round(one.seconds, 6)}
    event("request", {key: value for key, value in fields.items() if value != "" and value is not False})


@contextmanager
def of_request(its_id: str) -> Iterator[None]:
    """What is logged inside belongs to this request."""
    token = request_id.set(its_id)
    try:
        yield
    finally:
        request_id.reset(token)


def configure(level: str = "INFO", *, as_json: bool = True, stream: TextIO | None = None, worker: str = "") -> None:
    """Take over this process's logging, uvicorn's loggers too (give it log_config=None). worker: the model it serves.

    uvicorn's access log, which writes paths as they came, is silenced; access() is in its place.
    """
    chosen = logging.StreamHandler(stream or sys.stderr)
    chosen.setFormatter(JsonFormatter(worker) if as_json else PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [chosen]
    root.setLevel(logging.WARNING)
    logging.getLogger(_MAIN_PACKAGE).setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        its = logging.getLogger(name)
        its.handlers[:] = []
        its.propagate = name != "uvicorn.access"
        its.setLevel(level)
    logging.raiseExceptions = False  # a line that can't be written is lost; logging would print its arguments
    _take_last_words()


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON."""

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_told(record, self._worker), ensure_ascii=False)


class PlainFormatter(logging.Formatter):
    """The same facts for people: time, level, event, and the fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        told = _told(record, "")
        trace = told.pop("trace", [])
        head = f"{told.pop('time')[11:19]} {told.pop('level'):<7} {told.pop('event')}"
        told.pop("logger")
        pairs = [f"{key}={value}" for key, value in told.items()]
        return "\n".join([" ".join([head, *pairs]), *(f"    {place}" for place in trace)])


def _told(record: logging.LogRecord, worker: str) -> dict[str, Any]:
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "event": _words(record)}
    told["logger"] = record.name
    if its_id := request_id.get():
        told["request_id"] = its_id[:_LONGEST]
    if worker:
        told["worker"] = worker
    for key, value in getattr(record, "fields", {}).items():
        if key in FIELDS and isinstance(value, (str, int, float, bool, type(None))):
            told[key] = value[:_LONGEST] if isinstance(value, str) else value
    if record.exc_info and record.exc_info[1] is not None:
        told["error"] = kind(record.exc_info[1])
        told["trace"] = places(record.exc_info[1])
    return told


def _words(record: logging.LogRecord) -> str:
    """The line's wording. Ours is whole, as nothing of ours logs what a client sent; others' keeps numbers alone.

    A message of several lines is cut after the first: asyncio writes there what a task held.
    """
    if record.name.partition(".")[0] == _MAIN_PACKAGE:
        return record.getMessage()
    args = record.args if isinstance(record.args, tuple) else ()
    kept = tuple(a if isinstance(a, (int, float)) else "…" for a in args)
    words = str(record.msg).partition("\n")[0]
    if not args:
        return words
    try:
        return words % kept
    except (TypeError, ValueError):
        return words


def kind(error: BaseException) -> str:
    """An exception's type, and those of what caused it, from the last to the first."""
    names, seen = [], set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        names.append(type(at).__name__)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return " from ".join(names)


def places(error: BaseException) -> list[str]:
    """Where an exception passed: file, line and function, without the source's text or any value."""
    frames = traceback.extract_tb(error.__traceback__, limit=-40)
    return [f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]


def _short(path: str) -> str:
    """A file's place from its package on, so that machines' folders are not told."""
    parts = Path(path).parts
    for root in ("site-packages", _MAIN_PACKAGE):
        if root in parts:
            return "/".join(parts[parts.index(root) + (root == "site-packages") :])
    return Path(path).name


def _take_last_words() -> None:
    def uncaught(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            log.critical("uncaught exception", exc_info=error)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            log.critical("uncaught exception in a thread", exc_info=args.exc_value)

    def unraisable(args: Any) -> None:
        log.error("exception that nobody could catch", exc_info=args.exc_value)

    def warn(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: IO[str] | None = None,
        line: str | None = None,
    ) -> None:
        log.warning("%s at %s:%d", category.__name__, _short(filename), lineno)

    sys.excepthook = uncaught
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable
    warnings.showwarning = warn
