from __future__ import annotations

import random
from pathlib import Path

import pytest

from medcompile.serve import duplicates
from medcompile.serve.batch_lines import digest
from medcompile.serve.duplicates import find


def write(path: Path, ids: list[str | None]) -> Path:
    path.write_bytes(b"".join(digest(its, number) for number, its in enumerate(ids, start=1)))
    return path


def test_no_records_have_no_duplicates(tmp_path: Path) -> None:
    assert find(write(tmp_path / "ids", [])).count == 0


def test_each_record_is_told_with_the_first_of_its_id(tmp_path: Path) -> None:
    found = find(write(tmp_path / "ids", ["a", "b", "a", None, "c", None, "b", "a"]))
    assert (found.count, found.pairs) == (3, ((1, 3), (2, 7), (1, 8)))


@pytest.mark.parametrize("at_a_time", [60, 1000, 10_000])
def test_any_number_of_passes_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(duplicates, "PASS_RECORDS", at_a_time)
    chance = random.Random(1)
    ids: list[str | None] = [str(chance.randint(0, 5000)) for _ in range(3000)]
    first: dict[str | None, int] = {}
    wanted = []
    for number, its in enumerate(ids, start=1):
        if its in first:
            wanted.append((first[its], number))
        first.setdefault(its, number)
    found = find(write(tmp_path / "ids", ids))
    assert found.count == len(wanted)
    assert set(found.pairs) <= set(wanted) and len(found.pairs) == duplicates.TOLD
