from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import DataError, InputError, UsageError
from medcompile.serve import files
from medcompile.serve.files import CsvRows, Folder, JsonLines, ParquetRows, Place, Record, Source


def every(source: Source, at: Place | None = None) -> list[Record]:
    return list(source.records(at or Place()))


def texts(source: Source) -> list[bytes | str | None]:
    return [record.data for record in every(source)]


def goes_on_anywhere(source: Source) -> None:
    """From the place after each record, exactly the others come."""
    whole = every(source)
    assert [record.number for record in whole] == list(range(1, len(whole) + 1))
    for i, record in enumerate(whole):
        assert every(source, Place(record.next, record.number, record.line)) == whole[i + 1 :]
    assert not whole or whole[-1].next <= source.total


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_every_line_that_is_not_blank_is_a_record_with_its_line(tmp_path: Path) -> None:
    source = JsonLines(put(tmp_path / "a.jsonl", b"\xef\xbb\xbf{1}\n\n  \r\n{2}\r\n{3}"))
    assert [(r.number, r.line, r.data) for r in every(source)] == [(1, 1, b"{1}\n"), (2, 4, b"{2}\r\n"), (3, 5, b"{3}")]
    goes_on_anywhere(source)


def test_a_line_that_is_too_long_is_passed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 10)
    monkeypatch.setattr(files, "_PIECE", 7)
    source = JsonLines(put(tmp_path / "a.jsonl", b"{1}\n" + b"x" * 10 + b"\n" + b"y" * 11 + b"\n{4}\n" + b"z" * 100))
    found = every(source)
    assert [r.data for r in found] == [b"{1}\n", b"x" * 10 + b"\n", None, b"{4}\n", None]
    assert "is longer than" in found[2].problem
    goes_on_anywhere(source)


def test_a_files_identity_changes_with_what_it_holds(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b"{1}\n")
    before = JsonLines(path).identity()
    assert JsonLines(path).identity() == before
    put(path, b"{2}\n")
    assert JsonLines(path).identity() != before


def test_a_file_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        JsonLines(tmp_path / "none.jsonl")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.text(), st.text()), max_size=8), ending=st.sampled_from(["\n", "\r\n"]))
def test_whatever_csv_writes_is_read_again_from_any_row_on(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ending: str
) -> None:
    rows = [r for r in rows if all(c < "\ud800" or c > "\udfff" for c in "".join(r)) and "".join(r).strip()]
    rows = [r for r in rows if "\r" not in "".join(r)]  # a lone return is kept by the writer and lost by no reader
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator=ending).writerows([("id", "note"), *rows])
    path = put(tmp_path_factory.mktemp("csv") / "a.csv", buffer.getvalue().encode())
    source = CsvRows(path, "note")
    assert texts(source) == [note for _, note in rows]
    assert [tuple(row or ()) for row in source.rows()] == rows
    goes_on_anywhere(source)


def test_a_bad_row_is_one_bad_record(tmp_path: Path) -> None:
    source = CsvRows(put(tmp_path / "a.csv", b'id,note\n1,ok\n2\n3,"x"y\n4,\xff\n\n5,"two\nlines"\n'), "note")
    found = every(source)
    assert [r.data for r in found] == ["ok", None, None, None, "two\nlines"]
    assert all("check its quotes" in r.problem for r in found[1:4])
    assert list(source.rows()) == [["1", "ok"], None, None, None, ["5", "two\nlines"]]
    goes_on_anywhere(source)


def test_a_quote_that_never_closes_takes_no_more_memory_than_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1000)
    source = CsvRows(put(tmp_path / "a.csv", b'note\n"open\n' + b"x" * 90 + b"\n" * 50 + b"y,y\n" * 2000), "note")
    assert max(b.next - a.next for a, b in zip(every(source), every(source)[1:], strict=False)) <= 2000


@pytest.mark.parametrize("column", ["text", "twice"])
def test_a_column_that_is_not_there_once_is_told_with_those_that_are(tmp_path: Path, column: str) -> None:
    with pytest.raises(UsageError) as told:
        CsvRows(put(tmp_path / "a.csv", b"note,twice,twice\n"), column)
    assert "note" in told.value.fix


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def made(notes: list[str | None], group: int = 3) -> Path:
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"id": list(range(len(notes))), "note": notes}), path, row_group_size=group)
        return path

    return made


def test_a_parquet_file_is_read_from_any_row_on(table: Callable[..., Path]) -> None:
    notes = [f"note {i}" for i in range(10)]
    source = ParquetRows(table([*notes, None]), "note")
    assert texts(source) == [*notes, None]
    assert every(source)[-1].problem == "holds no text"
    goes_on_anywhere(source)


def test_a_parquet_column_that_is_no_text_is_refused(table: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="not text"):
        ParquetRows(table(["a"]), "id")


def test_what_is_no_parquet_file_is_told_without_its_bytes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="can't be read as Parquet"):
        ParquetRows(put(tmp_path / "a.parquet", b"PAR1 not really"), "note")


def test_a_folder_gives_its_images_in_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.png", "a/2.DCM", "a/1", "notes.txt", ".hidden.png", ".git/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        put(tmp_path / name, b"x")
    source = Folder(tmp_path)
    assert texts(source) == ["a/1", "a/2.DCM", "b.png"]
    goes_on_anywhere(source)


def test_a_folders_identity_is_of_its_files_names(tmp_path: Path) -> None:
    put(tmp_path / "a.png", b"x")
    before = Folder(tmp_path).identity()
    put(tmp_path / "b.png", b"x")
    assert Folder(tmp_path).identity() != before


def test_a_folder_without_images_is_refused_and_so_is_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no image"):
        Folder(tmp_path)
    put(tmp_path / "a.png", b"12345")
    source = Folder(tmp_path)
    assert (source.read("a.png"), source.size_bytes("a.png")) == (b"12345", 5)
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 4)
    with pytest.raises(InputError, match="larger than"):
        source.read("a.png")
    os.unlink(tmp_path / "a.png")  # noqa: PTH108
    with pytest.raises(InputError, match="can't be read"):
        source.read("a.png")
    assert source.size_bytes("a.png") == 0
