"""Readers of data files, one record at a time: JSON lines, CSV with a header, CoNLL columns, indices of images, .npz.

Each yields (line, fields by our names); what the fields mean for a model is items.py's. An error names the file and
the line and never shows any of the text, nor what an index calls an image: either may be a patient's.
"""

from __future__ import annotations

import csv
import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medcompile.data.manifest import GROUPS, Manifest
from medcompile.errors import DataError
from medcompile.recipe_yaml import nearest

MAX_FIELD_CHARS = 64 * 2**20

# What numpy and zipfile raise on broken archives, as seen in a fuzz of both.
BROKEN_NPZ = (
    *(OSError, EOFError, ValueError, TypeError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A line of a data file, or what else is counted there ("row 7"), for error messages."""

    manifest: str
    file: str
    line: int | str

    def error(self, message: str, fix: str = "") -> DataError:
        return DataError(f"{self.manifest}: {self.file}:{self.line}: {message}", fix=fix or "correct that line")


def records(manifest: Manifest) -> Iterator[tuple[Place, Record]]:
    """Every record of every file of the manifest, in order. Raises DataError at the first one that is malformed."""
    read = {"jsonl": _jsonl, "csv": _csv, "conll": _conll, "images": _images, "npz": _npz}[manifest.format]
    for name in manifest.paths:
        count = 0
        for place, record in read(manifest, name, manifest.file(name)):
            count += 1
            yield place, record
        if count == 0:
            raise DataError(f"{manifest.name}: {name} holds no records", fix="check that it is the right file")


def _key(field: str) -> str:
    """Where the manifest names the column of that field."""
    return field if field.startswith(GROUPS) else f"fields.{field}"


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
        for field, key in manifest.columns.items():
            if key not in value:
                raise place.error(f"has no key {key!r}, which {_key(field)} names", "correct the line or the manifest")
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
            for field, column in manifest.columns.items():
                if column not in header:
                    raise place.error(
                        f"the header has no column {column!r}, which {_key(field)} names",
                        "add a header line with the column names, or correct fields in the manifest",
                    )
        elif row:
            if len(row) != len(header):
                raise place.error(f"has {len(row)} columns; the header has {len(header)}", "check quotes and commas")
            yield place, {field: row[header.index(str(column))] for field, column in manifest.columns.items()}


def _conll(manifest: Manifest, name: str, path: Path) -> Iterator[tuple[Place, Record]]:
    columns: int | None = None
    document = 0
    start: Place | None = None
    rows: list[list[str]] = []

    def sentence() -> Record:
        record: Record = {field: [row[int(column)] for row in rows] for field, column in manifest.columns.items()}
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


def _images(manifest: Manifest, name: str, path: Path) -> Iterator[tuple[Place, Record]]:
    """The records of an index, image being the file, which is there and lies in the index's folder."""
    folder = path.parent.resolve()
    for place, record in (_csv if name.endswith(".csv") else _jsonl)(manifest, name, path):
        yield place, record | {"image": _inside(place, folder, record["image"])}


def _inside(place: Place, folder: Path, written: Any) -> Path:
    if not isinstance(written, str) or not written.strip():
        raise place.error("image is not the path of a file", "write the path from the index's folder")
    if PureWindowsPath(written).anchor or written.startswith("/") or ".." in PurePosixPath(written).parts:
        raise place.error(
            "its image is not named by a path inside the index's folder",
            "write the path from the index's folder, without .. and not absolute",
        )
    try:
        found = (folder / written).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # not there; links in a circle; a null byte
        raise place.error("its image is not there", "check the path, which starts at the index's folder") from None
    if not found.is_relative_to(folder):
        raise place.error(
            "its image is a link that leaves the index's folder", "copy the image, or put the index above it"
        )
    if not found.is_file():
        raise place.error("its image is not a file", "name one image file on each line")
    return found


def _npz(manifest: Manifest, name: str, path: Path) -> Iterator[tuple[Place, Record]]:
    """One record a row, image being a view into the one array in memory."""
    columns: dict[str, Any] = {}
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            for field, key in manifest.columns.items():
                if key not in arrays.files:
                    raise DataError(
                        f"{manifest.name}: {name} has no array {key!r}, which {_key(field)} names"
                        f"{nearest(str(key), arrays.files)}",
                        fix="see numpy.load(FILE).files, and correct fields in the manifest",
                    )
                array = arrays[str(key)]
                if not isinstance(array, np.ndarray):  # numpy gives an entry that is no array as bytes
                    raise ValueError
                columns[field] = _pixels(manifest, name, array) if field == "image" else _column(manifest, field, array)
    except BROKEN_NPZ:
        raise DataError(
            f"{manifest.name}: {name} cannot be read as an .npz of plain arrays",
            fix="write it with numpy.savez_compressed; text as arrays of dtype str, never of objects",
        ) from None
    for field, values in columns.items():
        if len(values) != len(columns["image"]):
            raise DataError(
                f"{manifest.name}: {name}: {len(values)} rows of {field} for {len(columns['image'])} images",
                fix=f"correct {_key(field)}, or the file",
            )
    for row in range(len(columns["image"])):
        yield Place(manifest.name, name, f"row {row}"), {field: values[row] for field, values in columns.items()}


def _pixels(manifest: Manifest, name: str, array: NDArray[Any]) -> NDArray[Any]:
    grey = array.ndim == 3
    if not (grey or (array.ndim == 4 and array.shape[3] == 3)) or 0 in array.shape[1:]:
        raise DataError(
            f"{manifest.name}: {name}: images have the shape {array.shape}", fix="use [n, height, width] or [..., 3]"
        )
    if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{manifest.name}: {name}: images have the type {array.dtype}",
            fix="use uint8, uint16 or floats from 0 to 1",
        )
    return array


def _column(manifest: Manifest, field: str, array: NDArray[Any]) -> list[Any]:
    """Words or whole numbers, one a row; a second dimension of one is passed over (MedMNIST's labels have it)."""
    kinds = {"U": "text"} if field == "text" else {"U": "text", "i": "whole numbers", "u": "whole numbers"}
    if array.dtype.kind not in kinds or array.ndim == 0 or array.size != array.shape[0]:
        raise DataError(
            f"{manifest.name}: the array {manifest.columns[field]!r} is {array.dtype} of shape {array.shape}",
            fix=f"{field} wants one value a row: {' or '.join(dict.fromkeys(kinds.values()))}",
        )
    values: list[Any] = array.reshape(-1).tolist()
    return values
