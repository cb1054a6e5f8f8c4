"""Where a batch's answers gather until all are there, and what lets a run go on after any kind of end.

Beside OUT stand OUT.part, the answers as lines in the order of the records; OUT.part.journal; and OUT.part.ids. Why a
killed run loses and doubles nothing:
- Line n of the part answers record n, always; so the number of whole lines says which record comes next.
- A line of the journal (a Mark) is written after what it counts was flushed to the disk, and bears a checksum. So the
  last whole mark is true, even after a power cut.
- Lines after that mark are kept only one by one while each is whole, by the checksum in it, and bears the id that its
  place demands; the rest, such as a torn last line, is cut off before anything is added.
- OUT appears by one rename, once every record has its line.
A lock on the journal keeps a second run away. Where answers come from is batch.py's.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from medcompile.errors import DataError, MedcompileError, UsageError
from medcompile.serve.files import Place

_BUFFER = 1 << 20
_VERSION = 1
_ID_BYTES = 16


@dataclass(frozen=True)
class Mark:
    """What is known to be safe: so many records have lines, of so many bytes; the next one begins at position, line.

    failed: of these lines, those that tell an error. seconds: of work so far, over all runs.
    """

    position: int = 0
    line: int = 0
    records: int = 0
    failed: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    done: bool = False

    @property
    def place(self) -> Place:
        return Place(self.position, self.records, self.line)


class Spool:
    """A context manager. about: what must be the same for a run to go on with another one's answers.

    ids: the file of all custom_ids' digests, 16 bytes each, in order. mark: how far it is.
    Raises UsageError where OUT is there already, another run writes it, or what was begun is not what is asked now
    (unless restart: then everything begins anew).
    """

    def __init__(self, out: Path, about: Mapping[str, str], *, restart: bool = False) -> None:
        self.out = out
        self.part = out.with_name(out.name + ".part")
        self.ids = out.with_name(out.name + ".part.ids")
        self._journal_path = out.with_name(out.name + ".part.journal")
        self._about = dict(about)
        self.mark = Mark()
        self._file: IO[bytes] | None = None
        self._ids: IO[bytes] | None = None
        self._journal = self._locked()
        try:
            self._begin(restart)
        except BaseException:
            self._journal.close()
            raise

    @property
    def begun(self) -> bool:
        """Whether an earlier run left something to go on with."""
        return self._begun

    @property
    def finished(self) -> bool:
        """Whether an earlier run did all but clear up."""
        return self.mark.done and not self.part.exists() and self.out.exists()

    def id(self, number: int) -> str:
        """Of the answer to that record: of this batch and its place, so that a line can be told to be the right one."""
        return f"batch_req_{self._run}_{number:012d}"

    # ---- what an earlier run left, in this order

    def open(self) -> None:
        """Be ready for keep() and cut(), then for add()."""
        ids_bytes = _ID_BYTES * self.mark.records
        if self.mark.records and (not self.ids.exists() or self.ids.stat().st_size < ids_bytes):
            raise DataError(f"{self.ids} is shorter than it was", fix="begin anew with --restart")
        with _told(self.part, self.mark.records):
            self._file = _opened(self.part)
            self._ids = _opened(self.ids)
            self._ids.truncate(ids_bytes)
            self._ids.seek(ids_bytes)

    def survivors(self) -> Iterator[bytes]:
        """Whole lines after the mark, each to be checked and kept with keep(), up to the first that is not kept."""
        with self.part.open("rb") as file:
            file.seek(self.mark.size_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield line

    def keep(self, line: bytes, digest: bytes, *, position: int, at_line: int, failed: bool) -> None:
        """This line, which is in the part already, stays. Arguments as add()'s."""
        assert self._ids is not None
        self._ids.write(digest)
        self._advance(line, position, at_line, failed)

    def cut(self) -> None:
        """Remove all that was not kept."""
        assert self._file is not None
        with _told(self.part, self.mark.records):
            self._file.truncate(self.mark.size_bytes)
            self._file.seek(self.mark.size_bytes)

    # ---- more

    def add(self, line: bytes, digest: bytes, *, position: int, at_line: int, failed: bool) -> None:
        """The next record's answer, whole, with its newline. digest: 16 bytes of its custom_id.

        position, at_line: where the record after it begins. failed: the line tells an error.
        """
        assert self._file is not None and self._ids is not None
        assert len(digest) == _ID_BYTES and line.find(b"\n") == len(line) - 1
        with _told(self.part, self.mark.records):
            self._file.write(line)
            self._ids.write(digest)
        self._advance(line, position, at_line, failed)

    def flush(self) -> Mark:
        """Hand what was added to the system. Returns the mark that commit() may then write."""
        assert self._file is not None and self._ids is not None
        with _told(self.part, self.mark.records):
            self._file.flush()
            self._ids.flush()
        return self.mark

    def commit(self, mark: Mark) -> None:
        """Make what flush() told of outlive a power cut. Slow; may run in a thread beside add()."""
        assert self._file is not None and self._ids is not None
        with _told(self.part, mark.records):
            os.fsync(self._file.fileno())
            os.fsync(self._ids.fileno())
            self._write(asdict(mark))

    def finish(self, made: Path | None = None) -> None:
        """All is there: let OUT appear, and clear up. made: a file to become OUT in place of the part itself."""
        mark = replace(self.flush(), done=True)
        self.commit(mark)
        self._close_files()
        with _told(self.part, mark.records):
            (made or self.part).replace(self.out)
            _sync_folder(self.out.parent)
        self.clear()

    def clear(self) -> None:
        """Remove what stands beside OUT."""
        self.part.unlink(missing_ok=True)
        self.ids.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)  # last: while it is there, its mark tells that all was done
        _sync_folder(self.out.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self._file is not None and not self._file.closed and not isinstance(error, OSError):
                self.flush()
        except MedcompileError:
            if error is None:
                raise
        finally:
            self._close_files()
            self._journal.close()

    # ---- inside

    def _locked(self) -> IO[bytes]:
        """The journal, open and locked until it is closed or this process ends."""
        while True:
            try:
                journal = self._journal_path.open("ab+")
            except OSError as error:
                raise UsageError(
                    f"{self._journal_path} can't be written: {error.strerror}", fix="choose another --out"
                ) from None
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                journal.close()
                raise UsageError(
                    f"another run is writing {self.out}", fix="wait for it, or choose another --out"
                ) from None
            try:  # a run that finished just now may have removed the file that was locked here
                if self._journal_path.stat().st_ino == os.fstat(journal.fileno()).st_ino:
                    return journal
            except FileNotFoundError:
                pass
            journal.close()

    def _begin(self, restart: bool) -> None:
        if restart:
            self._journal.truncate(0)
            self.part.unlink(missing_ok=True)
        entries = list(self._entries())
        self._begun = bool(entries)
        if not entries:
            if self.out.exists() and not restart:
                self._journal_path.unlink()
                raise UsageError(f"{self.out} is there already", fix="remove it, choose another --out, or --restart")
            self.part.unlink(missing_ok=True)  # of a run that died before its journal was begun, or of something else
            self._run = secrets.token_hex(6)
            with _told(self._journal_path, 0):
                self._write({"version": _VERSION, "run": self._run, "about": self._about})
            return
        head, *marks = entries
        self._run = str(head.get("run", ""))
        before = head.get("about")
        if head.get("version") != _VERSION or not isinstance(before, dict) or before != self._about:
            other = sorted({*self._about, *before} if isinstance(before, dict) else self._about)
            changed = [k for k in other if not isinstance(before, dict) or before.get(k) != self._about.get(k)]
            raise UsageError(
                f"{self.part} was begun with other {', '.join(changed) or 'settings'}",
                fix="repeat the command that began it, or give --restart to begin anew",
            )
        if marks:
            fields = Mark.__dataclass_fields__
            self.mark = Mark(**{key: value for key, value in marks[-1].items() if key in fields})  # type: ignore[arg-type]
        held = self.part.stat().st_size if self.part.exists() else 0
        if held < self.mark.size_bytes and not self.finished:
            raise DataError(
                f"{self.part} holds {held} bytes; its journal tells of {self.mark.size_bytes}",
                fix="it was changed by something else; begin anew with --restart",
            )

    def _entries(self) -> Iterator[dict[str, object]]:
        """The journal's whole lines, up to the first that is torn."""
        self._journal.seek(0)
        whole = 0
        for line in self._journal:
            entry = _checked(line)
            if entry is None:
                break
            whole += len(line)
            yield entry
        self._journal.truncate(whole)

    def _advance(self, line: bytes, position: int, at_line: int, failed: bool) -> None:
        m = self.mark
        self.mark = replace(
            m,
            position=position,
            line=at_line,
            records=m.records + 1,
            failed=m.failed + failed,
            size_bytes=m.size_bytes + len(line),
        )

    def _write(self, entry: Mapping[str, object]) -> None:
        text = json.dumps(entry, sort_keys=True)
        self._journal.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _close_files(self) -> None:
        for file in (self._file, self._ids):
            if file is not None:
                with suppress(OSError):  # what it held can't be written; what is there already is safe
                    file.close()


class _told:  # noqa: N801  # reads as a word where it is used
    """Turns a failing disk into an error that says what is safe."""

    def __init__(self, path: Path, records: int) -> None:
        self._path = path
        self._records = records

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise MedcompileError(
                f"{self._path} can't be written: {error.strerror}",
                fix="make room on the disk and repeat the command; it goes on after the last whole line",
            ) from None


def _opened(path: Path) -> IO[bytes]:
    path.touch(mode=0o600)  # answers are about patients as much as what was asked
    return path.open("r+b", buffering=_BUFFER)


def _checked(line: bytes) -> dict[str, object] | None:
    crc, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or crc != f"{zlib.crc32(text[:-1]):08x}".encode():
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
