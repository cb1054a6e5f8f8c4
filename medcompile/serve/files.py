"""What a batch reads: a file of JSON lines, a table with a column of texts, or a folder of images, from any place on.

A source gives records one after the other, each with the position at which the next one begins, so that a run can go
on where another one stopped. It holds one record (of a Parquet file: one small group of rows) in memory at a time.
What a record asks of a model is batch_lines.py's.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medcompile.errors import BackendUnavailable, DataError, InputError, UsageError

MAX_RECORD_BYTES = 64 << 20
"""A longer line is passed over, in pieces, and told as a bad one."""
_PIECE = 1 << 20
_EDGE = 1 << 16
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom", "")
"""A folder's other files are left out. Files without a suffix are taken, as DICOM files often have none."""


@dataclass(frozen=True)
class Record:
    """number: its place among the records, from 1. line: where it stands, for people. next: where the next one begins.

    data: a line's bytes, a cell's text, or an image's path in the folder; None for what can't be read (see problem).
    """

    number: int
    line: int
    next: int
    data: bytes | str | None
    problem: str = ""


@dataclass(frozen=True)
class Place:
    """Where to go on: a position that a record told, its number and line less one."""

    position: int = 0
    number: int = 0
    line: int = 0


class Source(ABC):
    """total: the position after the last record, to tell progress by. unit: what a record is called."""

    total: int
    unit: str

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def records(self, at: Place) -> Iterator[Record]:
        """Every record from there on."""

    @abstractmethod
    def identity(self) -> str:
        """Another one after a change of what is read."""


class JsonLines(Source):
    """Every line that is not blank."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.total = _size(path)

    def identity(self) -> str:
        return _file_identity(self.path)

    def records(self, at: Place) -> Iterator[Record]:
        number, line, end = at.number, at.line, at.position
        with self.path.open("rb", buffering=_PIECE) as file:
            file.seek(end)
            while data := file.readline(MAX_RECORD_BYTES + 1):
                line += 1
                end += len(data)
                data = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
                long = len(data) > MAX_RECORD_BYTES and not data.endswith(b"\n")
                if long:
                    end += _rest_of_line(file)
                if long or data.strip():
                    number += 1
                    told = f"is longer than {MAX_RECORD_BYTES >> 20} MiB" if long else ""
                    yield Record(number, line, end, None if long else data, told)


class CsvRows(Source):
    """One column of a CSV file in UTF-8 whose first row names the columns. Quoted cells may hold line ends."""

    unit = "row"

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path)
        self.total = _size(path)
        with path.open("rb") as file:
            head = next(_csv_records(file), b"")
            self.body = file.tell()
        self.header = _cells(head.removeprefix(b"\xef\xbb\xbf")) or []
        self._at = _column(path, column, self.header)
        csv.field_size_limit(MAX_RECORD_BYTES)

    def identity(self) -> str:
        return f"{_file_identity(self.path)} {self._at}"

    def rows(self) -> Iterator[list[str] | None]:
        """Every row's cells; None for one that is not as wide as the header, or no CSV."""
        with self.path.open("rb", buffering=_PIECE) as file:
            file.seek(self.body)
            for data in _csv_records(file):
                if data.strip():
                    yield self._row(data)

    def records(self, at: Place) -> Iterator[Record]:
        number, end = at.number, at.position or self.body
        with self.path.open("rb", buffering=_PIECE) as file:
            file.seek(end)
            for data in _csv_records(file):
                end += len(data)
                if not data.strip():
                    continue
                number += 1
                cells = self._row(data)
                if cells is None:
                    told = f"is no row of {len(self.header)} columns in UTF-8; check its quotes and commas"
                    yield Record(number, number, end, None, told)
                else:
                    yield Record(number, number, end, cells[self._at])

    def _row(self, data: bytes) -> list[str] | None:
        cells = _cells(data)
        return cells if cells is not None and len(cells) == len(self.header) else None


class ParquetRows(Source):
    """One column of text of a Parquet file. Needs pyarrow."""

    unit = "row"
    _ROWS = 1024

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path)
        file = parquet(path)
        self.schema = file.schema_arrow
        self.header = list(self.schema.names)
        _column(path, column, self.header)
        self.column = column
        kind = self.schema.field(column).type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise UsageError(f"{path}: the column {column!r} holds {kind}, not text", fix="name a column of text")
        self.total = int(file.metadata.num_rows)
        file.close()

    def identity(self) -> str:
        return f"{_file_identity(self.path)} {self.column}"

    def batches(self, at: int = 0, columns: list[str] | None = None) -> Iterator[Any]:
        """Record batches of pyarrow from a row on; groups of rows before it are not read."""
        with parquet(self.path) as file:
            first, before = 0, 0
            while first < file.num_row_groups and before + file.metadata.row_group(first).num_rows <= at:
                before += file.metadata.row_group(first).num_rows
                first += 1
            groups = range(first, file.num_row_groups)
            for batch in file.iter_batches(self._ROWS, row_groups=groups, columns=columns, use_threads=False):
                skipped = min(max(0, at - before), batch.num_rows)
                before += batch.num_rows
                if skipped < batch.num_rows:
                    yield batch.slice(skipped)

    def records(self, at: Place) -> Iterator[Record]:
        number = at.number
        for batch in self.batches(number, [self.column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield Record(number, number, number, text, "" if text is not None else "holds no text")


class Folder(Source):
    """Every image file of a folder and the folders in it, in the order of their paths."""

    unit = "file"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names = sorted(_images_in(path))
        self.total = len(self.names)
        if not self.names:
            raise InputError(f"{path}: no image in this folder", fix=f"images end in {', '.join(IMAGE_SUFFIXES[:-1])}")

    def identity(self) -> str:
        return hashlib.sha256("\0".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()

    def records(self, at: Place) -> Iterator[Record]:
        for number in range(at.number + 1, self.total + 1):
            yield Record(number, number, number, self.names[number - 1])

    def size_bytes(self, name: str) -> int:
        """0 for a file that is gone."""
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return 0

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises InputError where it can't be read, or is beyond what any image should be."""
        try:
            with (self.path / name).open("rb") as file:
                data = file.read(MAX_RECORD_BYTES + 1)
        except OSError as error:
            raise InputError(f"can't be read: {error.strerror}") from None
        if len(data) > MAX_RECORD_BYTES:
            raise InputError(f"is larger than {MAX_RECORD_BYTES >> 20} MiB")
        return data


def parquet(path: Path) -> Any:
    """The open file. Raises BackendUnavailable without pyarrow, DataError for what is no Parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BackendUnavailable(
            f"{path}: Parquet is read by pyarrow, which is not installed", fix='pip install "medcompile[parquet]"'
        ) from None
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} can't be read as Parquet: {type(error).__name__}", fix="write it anew") from None


def _size(path: Path) -> int:
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file", fix="give a .jsonl, .csv or .parquet file, or a folder of images")
        return path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", fix="check the path") from None


def _file_identity(path: Path) -> str:
    """Of size, time of change, and both ends of the file: reading all of a large file would take long."""
    stat = path.stat()
    with path.open("rb") as file:
        ends = file.read(_EDGE)
        file.seek(max(0, stat.st_size - _EDGE))
        ends += file.read(_EDGE)
    return f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(ends).hexdigest()}"


def _rest_of_line(file: IO[bytes]) -> int:
    passed = 0
    while piece := file.readline(_PIECE):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _csv_records(file: IO[bytes]) -> Iterator[bytes]:
    """The bytes of each record: lines, joined while a quote is open. One that never closes ends at the longest."""
    pieces: list[bytes] = []
    quotes = size = 0
    while line := file.readline(MAX_RECORD_BYTES):
        pieces.append(line)
        quotes += line.count(b'"')
        size += len(line)
        if (quotes % 2 == 0 and line.endswith(b"\n")) or size >= MAX_RECORD_BYTES:
            yield b"".join(pieces)
            pieces, quotes, size = [], 0, 0
    if pieces:
        yield b"".join(pieces)


def _cells(data: bytes) -> list[str] | None:
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error):
        return None
    return rows[0] if len(rows) == 1 else None


def _column(path: Path, column: str, header: list[str]) -> int:
    if header.count(column) == 1:
        return header.index(column)
    how = "more than one column" if column in header else "no column"
    raise UsageError(f"{path}: {how} {column!r}", fix=f"name one with --column: {', '.join(header)}")


def _images_in(folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield str((Path(place) / name).relative_to(folder))
