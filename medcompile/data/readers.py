"""Readers of data files, one record at a time: JSON lines, CSV with a header, CoNLL columns.

Each yields (line, fields by our names); what the fields mean for a model is items.py's. An error names the file and
the line and never shows any of the text, which may be a patient's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcompile.data.manifest import Manifest
from medcompile.errors import DataError

MAX_FIELD_CHARS = 64 * 2**20

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A line of a data file, for error messages."""

    manifest: str
    file: str
    line: int

    def error(self, message: str, fix: str = "") -> DataError:
        return DataError(f"{self.manifest}: {self.file}:{self.line}: {message}", fix=fix or "correct that line")


def records(manifest: Manifest) -> Iterator[tuple[Place, Record]]:
    """Every record of every file of the manifest, in order. Raises DataError at the first one that is malformed."""
    read = {"jsonl": _jsonl, "csv": _csv, "conll": _conll}[manifest.format]
    for name in manifest.paths:
        count = 0
        for place, record in read(manifest, name, manifest.file(name)):
            count += 1
            yield place, record
        if count == 0:
            raise DataError(f"{manifest.name}: {name} holds no records", fix="check that it is the right file")


def _lines(manifest: Manifest, name: str, path: Path) -> Iterator[tuple[Place, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = Place(manifest.name, name, number)
            try:
                yield place, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise place.error("is not UTF-8 text", "save the file as UTF-8") from None


def _jsonl(manifest: Manifest, name: str, path: Path) -> Iterator[tuple[Place, Record]]:
    for place, line in _lines(manifest, name, path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise place.error("is not valid JSON", "write one JSON object on each line") from None
        if not isinstance(value, dict):
            raise place.error("is not a JSON object", 'write one object on each line, such as {"text": "..."}')
        record = {}
        for field, key in manifest.fields.items():
            if key not in value:
                raise place.error(f"has no key {key!r}, which fields.{field} names", "correct the line or the manifest")
            record[field] = value[key]
        yield place, record


def _csv(manifest: Manifest, name: str, path: Path) -> Iterator[tuple[Place, Record]]:
    csv.field_size_limit(MAX_FIELD_CHARS)  # the default of 128 KB is less than a long note
    reader = csv.reader((line for _, line in _lines(manifest, name, path)), strict=True)
    header: list[str] | None = None
    while True:
        place = Place(manifest.name, name, reader.line_num + 1)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise place.error("is not valid CSV", "check its quotes") from None
        if header is None:
            header = row
            for field, column in manifest.fields.items():
                if column not in header:
                    raise place.error(
                        f"the header has no column {column!r}, which fields.{field} names",
                        "add a header line with the column names, or correct fields in the manifest",
                    )
        elif row:
            if len(row) != len(header):
                raise place.error(f"has {len(row)} columns; the header has {len(header)}", "check quotes and commas")
            yield place, {field: row[header.index(str(column))] for field, column in manifest.fields.items()}


def _conll(manifest: Manifest, name: str, path: Path) -> Iterator[tuple[Place, Record]]:
    columns: int | None = None
    document = 0
    start: Place | None = None
    rows: list[list[str]] = []

    def sentence() -> Record:
        record: Record = {field: [row[int(column)] for row in rows] for field, column in manifest.fields.items()}
        return record | ({"document": f"{name}#{document}"} if document else {})

    for place, line in _lines(manifest, name, path):
        text = line.rstrip("\r\n")
        begins_document = text.startswith("-DOCSTART-")
        if not text.strip() or begins_document:
            if start is not None:
                yield start, sentence()
            start, rows = None, []
            document += begins_document
            continue
        row = text.split("\t") if "\t" in text else text.split()
        if columns is None:
            columns = max(len(row), 1 + max(int(c) for c in manifest.fields.values()))
        if len(row) != columns:
            raise place.error(f"has {len(row)} columns, not {columns}", "separate the columns by one tab")
        start = start or place
        rows.append(row)
    if start is not None:
        yield start, sentence()
