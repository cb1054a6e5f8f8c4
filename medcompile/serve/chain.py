"""The chain of an audit log: how a record becomes a line, and how the lines are checked. Adding lines is audit.py's.

hash = SHA-256(hash before || line feed || the line up to its hash); HMAC-SHA-256 of the same where there is a key
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medcompile.errors import UsageError

ZERO = "0" * 64
"""The hash before the first record."""
LONGEST_LINE = 65_536
"""Bytes; records are far below it."""
Plain = str | int | float | bool | None

_TAIL = b',"hash":"'


def line_of(
    number: int, now_s: float, event: str, fields: Mapping[str, Any], before: str, key: bytes | None
) -> tuple[bytes, str]:
    """A record as its line, and its hash. before: the hash of the record before it."""
    when = datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    told = {"n": number, "time": when, "event": event, **fields}
    body = json.dumps(told, separators=(",", ":"), allow_nan=False).encode()[:-1]
    made = _hash(before, body, key)
    return body + _TAIL + made.encode() + b'"}\n', made


@dataclass(frozen=True)
class Verdict:
    """What verify() found. problem: "" where the chain is whole, else what is wrong, and the file and line it is in.

    first, last: numbers of the first and last good record (-1 of none). head: the last good hash. before: the hash that
    the first file goes on from; not ZERO where older files have been moved away.
    """

    problem: str
    file: str
    line: int
    records: int
    first: int
    last: int
    head: str
    before: str
    keyed: bool

    @property
    def whole(self) -> bool:
        return not self.problem


def verify(path: Path, *, key: bytes | None = None, head: str = "") -> Verdict:
    """Check a log (a folder), or one file of it, from its first line to its last, and say where it breaks.

    head: a hash noted earlier, which must be that of some record here; so an end that was cut off is found.
    """
    check = _Check(key, head)
    files = files_of(path) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path} holds no audit log", fix="give the folder that --audit-log named")
    for file in files:
        if problem := check.file(file):
            return check.verdict(problem)
    if head and not check.met:
        check.line = 0
        return check.verdict("the given head is in no record here: the end was cut off, or this is another log")
    return check.verdict("")


def files_of(folder: Path) -> list[Path]:
    """A log's files, from the oldest to the newest."""
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdigit())


class _Check:
    """Goes through files in order, and keeps how far the chain holds."""

    def __init__(self, key: bytes | None, wanted: str) -> None:
        self._key, self._wanted = key, wanted
        self.met = False
        self.name, self.line = "", 0
        self._first, self._last, self._records = -1, -1, 0
        self._before, self._hash = ZERO, ""
        self._keyed = False

    def file(self, path: Path) -> str:
        """What is wrong in a file; "" for nothing."""
        self.name, self.line = path.name, 0
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                self.line += 1
                if problem := self._one(line, path):
                    return problem
        return ""

    def verdict(self, problem: str) -> Verdict:
        return Verdict(
            problem,
            self.name if problem else "",
            self.line if problem else 0,
            self._records,
            self._first,
            self._last,
            self._hash or self._before,
            self._before,
            self._keyed,
        )

    def _one(self, line: bytes, path: Path) -> str:
        body, mark, end = line.rpartition(_TAIL)
        told = end[:64]
        if not mark or end[64:] != b'"}\n':
            return "the line is cut off or altered"
        try:
            found = json.loads(body + b"}")
            number, event = found["n"], found["event"]
        except (ValueError, KeyError, TypeError):
            return "the line is no record: altered"
        if self.line == 1:
            if event != "opened" or number != int(path.stem if path.stem.isdigit() else -1):
                return "the file does not begin with the record that opens it: lines are missing, or it was renamed"
            if problem := self._opened(found, number):
                return problem
        if self._records and number != self._last + 1:
            return f"record {number} follows {self._last}: lines are missing, moved or put in"
        if not hmac.compare_digest(_hash(self._hash, body, self._key).encode(), told):
            return f"record {number} does not fit its hash: it, or one before it, was altered"
        if not self._records:
            self._first = number
        self._hash, self._last, self._records = told.decode(), number, self._records + 1
        self.met = self.met or self._hash == self._wanted
        return ""

    def _opened(self, found: Mapping[str, Any], number: int) -> str:
        before = found.get("before")
        if not isinstance(before, str) or (number == 0 and before != ZERO):
            return "the record that opens the file was altered"
        self._keyed = bool(found.get("keyed"))
        if self._keyed and self._key is None:
            return "this log has a key, without which nothing of it can be checked"
        if not self._records:
            self._before = self._hash = before
        elif before != self._hash:
            return "this file does not go on from the end of the one before: a file or its end is missing"
        return ""


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a log, in order, unchecked."""
    for path in files_of(folder):
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)


def read_key(path: Path) -> bytes:
    """A key from a file of at least 32 random bytes. Raises UsageError."""
    try:
        key = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", fix=f"head -c 32 /dev/urandom > {path}") from error
    if len(key) < 32:
        raise UsageError(f"{path} holds fewer than 32 bytes", fix=f"head -c 32 /dev/urandom > {path}")
    return key


def _hash(before: str, body: bytes, key: bytes | None) -> str:
    fed = before.encode() + b"\n" + body
    return hashlib.sha256(fed).hexdigest() if key is None else hmac.digest(key, fed, "sha256").hex()
