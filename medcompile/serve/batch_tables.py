"""A batch over a table's texts or a folder's images: what each is asked, and the answers as further columns.

    text                 label      score  scores                         error
    "no effusion"        normal     0.97   [{"label": "normal", ...}]

Until all are there, answers are lines as in any batch (spool.py); the table is written of them at the end. A row that
failed keeps its place, with what was wrong in its column error.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from medcompile.errors import UsageError
from medcompile.serve.batch_lines import ITEM_BYTES, Refused, Request
from medcompile.serve.files import CsvRows, Folder, ParquetRows, Record, Source

URLS = {
    "embed": "/v1/embeddings",
    "text": "/v1/embeddings",
    "image": "/v1/embeddings",
    "token-classification": "/v1/entities",
    "sequence-classification": "/v1/classify",
}
MATCH = "/v1/match"
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "/v1/embeddings": ("embedding",),
    "/v1/entities": ("entities",),
    "/v1/classify": ("label", "score", "scores"),
    MATCH: ("label", "score", "scores"),
}
ERROR = "error"
FILE = "file"
_ROWS = 1024


@dataclass(frozen=True)
class Question:
    """What every record is asked. body: all of it but the text, or the image that comes beside it."""

    url: str
    body: Mapping[str, Any] = field(repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*COLUMNS[self.url], ERROR)


def question(tasks: Sequence[str], task: str, model: str, *, images: bool, prompts: Sequence[str]) -> Question:
    """task: the one that was asked for, "" for the first that fits. Raises UsageError where the bundle has none."""
    fitting = [t for t in tasks if t in URLS and (t == "image") == images]
    chosen = task or next(iter(fitting), "")
    if chosen not in fitting:
        what = "images" if images else "a column of texts"
        raise UsageError(
            f"{model} has no task {chosen!r} for {what}" if task else f"{model} has no task for {what}",
            fix=f"choose from: {', '.join(fitting)}"
            if fitting
            else "ask it by a file of JSON lines; see docs/batch.md",
        )
    if prompts and not images:
        raise UsageError("--prompt is for images", fix="leave it out")
    if prompts:
        return Question(MATCH, {"model": model, "prompts": list(prompts)})
    return Question(URLS[chosen], {"model": model, "input": []} if images else {"model": model})


def asked(record: Record, wanted: Question, source: Source) -> Request | Refused:
    """What this row or file asks, under its number, or its path in the folder."""
    if isinstance(source, Folder):
        name = str(record.data)
        size = source.size_bytes(name)
        custom_id = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return Request(custom_id, wanted.url, dict(wanted.body), max(1, size // ITEM_BYTES), name)
    if record.data is None:
        return Refused(str(record.number), "invalid_row", f"row {record.number} {record.problem}")
    body = {**wanted.body, "input": record.data}
    return Request(str(record.number), wanted.url, body, max(1, len(record.data) // ITEM_BYTES))


def check_sink(source: Source, out: Path, wanted: Question) -> None:
    """Raises UsageError where OUT's kind does not go with what is read, or its columns would clash."""
    fits = {CsvRows: {".csv"}, ParquetRows: {".parquet"}, Folder: {".csv", ".parquet"}}[type(source)] | {".jsonl"}
    if out.suffix not in fits:
        raise UsageError(f"{out}: not a kind of file for this input", fix=f"name it {' or '.join(sorted(fits))}")
    header = getattr(source, "header", [FILE])
    if clash := set(header) & set(wanted.columns):
        raise UsageError(
            f"{source.path} has columns named as the answers': {', '.join(sorted(clash))}",
            fix="rename them, or write JSON lines: -o NAME.jsonl",
        )


def write(source: Source, answers: Path, wanted: Question, made: Path, suffix: str) -> None:
    """The table of the source's rows and their answers, which stand in answers line by line."""
    if suffix == ".csv":
        _write_csv(source, answers, wanted, made)
    else:
        _write_parquet(source, answers, wanted, made)


def _write_csv(source: Source, answers: Path, wanted: Question, made: Path) -> None:
    header, rows = (
        (source.header, (row or [""] * len(source.header) for row in source.rows()))
        if isinstance(source, CsvRows)
        else ([FILE], ([name] for name in _names(source)))
    )
    with made.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *wanted.columns])
        for row, answer in zip(rows, _told(answers, wanted), strict=True):
            writer.writerow([*row, *(_cell(answer[column]) for column in wanted.columns)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else orjson.dumps(value).decode("utf-8")


def _write_parquet(source: Source, answers: Path, wanted: Question, made: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    text, real, whole = pa.string(), pa.float64(), pa.int64()
    types = {
        "embedding": pa.list_(pa.float32()),
        "entities": pa.list_(
            pa.struct([("label", text), ("text", text), ("start", whole), ("end", whole), ("score", real)])
        ),
        "label": text,
        "score": real,
        "scores": pa.list_(pa.struct([("label", text), ("score", real)])),
        ERROR: text,
    }
    more = pa.schema([(column, types[column]) for column in wanted.columns])
    told = _told(answers, wanted)
    before = source.schema if isinstance(source, ParquetRows) else pa.schema([(FILE, text)])
    schema = pa.schema([*before, *more], metadata=before.metadata)
    with ParquetWriter(made, schema) as writer:
        for batch in source.batches() if isinstance(source, ParquetRows) else _file_batches(source, before):
            rows = list(islice(told, batch.num_rows))
            added = [pa.array([row[column] for row in rows], types[column]) for column in wanted.columns]
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, *added], schema=schema))


def _file_batches(source: Source, schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    names = iter(_names(source))
    while some := [n.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for n in islice(names, _ROWS)]:
        yield pa.RecordBatch.from_pydict({FILE: some}, schema=schema)


def _names(source: Source) -> list[str]:
    assert isinstance(source, Folder)
    return source.names


def _told(answers: Path, wanted: Question) -> Iterator[dict[str, Any]]:
    """Each line's columns."""
    with answers.open("rb") as file:
        for line in file:
            yield dict.fromkeys(wanted.columns) | _columns(orjson.loads(line))


def _columns(line: dict[str, Any]) -> dict[str, Any]:
    if line["error"] is not None:
        return {ERROR: line["error"]["message"]}
    body = line["response"]["body"]
    if line["response"]["status_code"] >= 400:
        return {ERROR: body["error"]["message"]}
    (item,) = body["data"]
    if "embedding" in item:
        return {"embedding": item["embedding"]}
    if "entities" in item:
        return {"entities": item["entities"]}
    scores = [{"label": score.get("label", score.get("prompt")), "score": score["score"]} for score in item["scores"]]
    return {**scores[0], "scores": scores}
