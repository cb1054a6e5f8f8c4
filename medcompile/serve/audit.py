"""The audit log: who asked what of which bundle, when, and how it ended. Lines are only ever added, and each holds the
digest of all before it. Never any content.

A log is a folder of files, each named after the number of its first record:

    audit/000000000000.jsonl      {"n":0,"time":"...","event":"opened",...,"hash":"<64 hex digits>"}
                                  {"n":1,"time":"...","event":"request","caller":"ward-3",...,"hash":"..."}
    audit/000000018231.jsonl      goes on where the file before ends

hash = SHA-256(the hash before it || the line up to its hash), and HMAC-SHA-256 of the same where the log has a key. So
a change of any bit, a line taken out, put in or moved is found by verify(). Two things a chain alone can't show: that
its *end* was cut off, and, without a key, that all of it was written anew. Against the first, keep `head` elsewhere
(the server logs it) and give it to verify(); against the second, use a key.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from medcompile.errors import AuditError, UsageError
from medcompile.serve.chain import LONGEST_LINE, ZERO, Plain, files_of, line_of, verify

Fsync = Literal["always", "interval", "never"]

log = logging.getLogger("medcompile.serve")


@dataclass(frozen=True)
class Record:
    """One request. caller: its key's name. route: as the app writes it, never as the client did.

    model, bundle: the served name and the bundle's digest, "" where none was reached. items: texts, images or answers.
    status: the HTTP status; 499 where the client left. purpose: a code of guard.PURPOSES. refused: requests without a
    valid key since the record before that are not told one by one.
    """

    caller: str
    request_id: str
    route: str
    status: int
    model: str = ""
    bundle: str = ""
    items: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    purpose: str = ""
    client: str = ""
    cached: bool = False
    refused: int = 0

    @property
    def plain(self) -> dict[str, Plain]:
        return {key: value for key, value in vars(self).items() if value not in ("", False) or key in ("caller",)}


class AuditLog:
    """A log to add to. One process at a time holds it; threads may share it.

    fsync: "always" before append() returns; "interval" a second later at most (a crash of this process loses nothing,
    a loss of power up to that second); "never" when the system likes. Raises AuditError for a log whose last file is
    broken, UsageError for one that another process holds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: bytes | None = None,
        fsync: Fsync = "interval",
        interval_s: float = 1.0,
        most_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self._key, self._policy, self._most_bytes, self._clock = folder, key, fsync, most_bytes, clock
        self._lock = threading.RLock()
        self._dirty = threading.Event()
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = _hold(folder)
        try:
            self._open()
        except BaseException:
            os.close(self._held)
            raise
        self._syncing = threading.Thread(target=self._sync_often, args=(interval_s,), name="audit-fsync", daemon=True)
        if fsync == "interval":
            self._syncing.start()
        log.info("audit log: record %d has hash %s", *self.head)

    @property
    def head(self) -> tuple[int, str]:
        """The number and the hash of the last record. Kept elsewhere, it shows later that nothing was cut off."""
        with self._lock:
            return self._next - 1, self._hash

    @property
    def waits(self) -> bool:
        """Whether append() waits for the disk."""
        return self._policy == "always"

    def append(self, record: Record) -> None:
        """Add one record. Raises AuditError where it can't be written; then what it tells of must not go on."""
        self._write("request", record.plain)

    def event(self, name: str, fields: Mapping[str, Plain] | None = None) -> None:
        """Add something that is no request: a start, keys that were read anew."""
        self._write(name, {"about": dict(fields)} if fields else {})

    def close(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._dirty.set()
            if self._policy != "never":
                os.fsync(self._file)
            os.close(self._file)
            os.close(self._held)
        log.info("audit log: record %d has hash %s", *self.head)
        if self._syncing.is_alive() and self._syncing is not threading.current_thread():
            self._syncing.join()

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    # ---- beginning

    def _open(self) -> None:
        files = files_of(self.folder)
        self._next, self._hash = 0, ZERO
        if not files:
            self._begin_file()
            self._write("opened", {})
            return
        torn = self._cut_torn_line(files[-1])
        for path in files[-2:]:  # the last may be empty: stopped between making the file and its first line
            checked = verify(path, key=self._key)
            if not checked.whole:
                raise AuditError(
                    f"{path}:{checked.line}: {checked.problem}",
                    fix="keep this folder as evidence, and give --audit-log a new one",
                )
            if checked.records:
                self._next, self._hash = checked.last + 1, checked.head
        self._file = os.open(files[-1], os.O_WRONLY | os.O_APPEND)
        self._size = files[-1].stat().st_size
        self._write("reopened", {"cut_bytes": torn} if torn else {})

    def _cut_torn_line(self, path: Path) -> int:
        """Take off what a crash left of a line that it was writing. Returns its bytes; the next record tells them."""
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LONGEST_LINE))
            tail = file.read()
            torn = len(tail) - (tail.rfind(b"\n") + 1)
            if torn:
                file.truncate(size - torn)
                os.fsync(file.fileno())
        return torn

    def _begin_file(self) -> None:
        path = self.folder / f"{self._next:012d}.jsonl"
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            _sync_folder(self.folder)
        except OSError as error:
            raise self._cannot(error) from error
        self._size = 0

    # ---- writing

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        with self._lock:
            if self._closed.is_set():
                raise AuditError("the audit log is closed", fix="start the server again")
            if self._size >= self._most_bytes:
                self._rotate()
            if not self._size:
                self._put("opened", {"format": 1, "before": self._hash, "keyed": self._key is not None})
            if event != "opened":
                self._put(event, fields)
        if self._policy == "interval":
            self._dirty.set()

    def _put(self, event: str, fields: Mapping[str, Any]) -> None:
        """Write a record as a whole. Half a line, of a full disk, is taken back before the error is raised."""
        line, made = line_of(self._next, self._clock(), event, fields, self._hash, self._key)
        try:
            wrote = os.write(self._file, line)
            if wrote < len(line):
                raise OSError(f"wrote {wrote} of {len(line)} bytes")
            if self._policy == "always":
                os.fsync(self._file)
        except OSError as error:
            try:
                os.ftruncate(self._file, self._size)
            except OSError:
                self._closed.set()  # what stands there now is not known: nothing may follow it
            raise self._cannot(error) from error
        self._next, self._hash, self._size = self._next + 1, made, self._size + len(line)

    def _rotate(self) -> None:
        if self._policy != "never":
            os.fsync(self._file)
        full = self._file
        self._begin_file()
        os.close(full)
        log.info("audit log: record %d has hash %s", *self.head)

    def _cannot(self, error: OSError) -> AuditError:
        return AuditError(
            f"the audit log can't be written: {error.strerror or error}",
            fix=f"make room or mend the disk that holds {self.folder}; requests are refused until then",
        )

    def _sync_often(self, interval_s: float) -> None:
        while not self._closed.is_set():
            self._dirty.wait()
            if self._closed.wait(interval_s):
                return
            self._dirty.clear()
            with self._lock:
                if not self._closed.is_set():
                    try:
                        os.fsync(self._file)
                    except OSError:
                        log.exception("the audit log can't be brought to disk")


def _hold(folder: Path) -> int:
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise UsageError(f"another process writes to {folder}", fix="give each server a folder of its own") from None
    return held


def _sync_folder(folder: Path) -> None:
    at = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)
