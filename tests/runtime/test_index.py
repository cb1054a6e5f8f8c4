from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile.errors import InputError, UsageError
from medcompile.runtime import index as index_module
from medcompile.runtime.index import Hit, Index

DIGEST, OTHER = "a" * 64, "b" * 64


def rows(n: int, dim: int = 8, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def keys(n: int) -> list[str]:
    return [f"study {i}" for i in range(n)]


def by_hand(query: Any, stored: Any, k: int) -> list[int]:
    cosines = stored @ query / np.linalg.norm(stored, axis=1) / np.linalg.norm(query)
    return [int(i) for i in np.argsort(-cosines)[:k]]


def test_hits_are_the_largest_cosines_best_first_whatever_the_lengths() -> None:
    stored = rows(200) * np.linspace(0.1, 50, 200, dtype=np.float32)[:, None]
    (query,) = rows(1, seed=1)
    hits = Index.of(stored, keys(200)).search(query, 7)
    assert [h.key for h in hits] == [f"study {i}" for i in by_hand(query, stored, 7)]
    best = stored[by_hand(query, stored, 1)[0]]
    assert hits[0].score == pytest.approx(best @ query / np.linalg.norm(best) / np.linalg.norm(query), abs=1e-6)


def test_several_queries_get_the_same_hits_as_each_alone_though_scores_come_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = Index.of(rows(50), keys(50))
    queries = rows(9, seed=2)
    alone = [[h.key for h in index.search(q, 3)] for q in queries]
    monkeypatch.setattr(index_module, "BLOCK_BYTES", 4 * 50 * 2)
    assert [[h.key for h in hits] for hits in index.search_all(queries, 3)] == alone


def test_equal_scores_come_in_the_order_they_were_added() -> None:
    index = Index.of(np.ones((5, 2), np.float32), ["e", "d", "c", "b", "a"])
    assert [h.key for h in index.search(np.array([1.0, 1.0]), 3)] == ["e", "d", "c"]


def test_what_is_added_later_is_found_and_fewer_than_k_are_all() -> None:
    index = Index(2)
    assert index.search(np.array([1.0, 0.0])) == []
    index.add(np.array([[1.0, 0.0]]), ["x"])
    index.add(np.array([0.0, 2.0]), ["y"])
    assert index.search(np.array([0.0, 1.0])) == [Hit("y", 1.0), Hit("x", 0.0)]
    assert len(index) == 2


def test_a_saved_index_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    index = Index.of(rows(20), ["über", "", "\ud800", *keys(17)], digest=DIGEST)
    index.save(tmp_path / "studies.index")
    again = Index.load(tmp_path / "studies.index", digest=DIGEST)
    query = rows(1, seed=3)
    assert again.search(query, 20) == index.search(query, 20)
    assert again.digest == DIGEST
    assert [p.name for p in tmp_path.iterdir()] == ["studies.index"]
    again.add(rows(1, seed=4), ["one more"])
    assert len(again) == 21


def test_an_empty_index_can_be_saved(tmp_path: Path) -> None:
    Index(8, digest=DIGEST).save(tmp_path / "i.npz")
    assert len(Index.load(tmp_path / "i.npz")) == 0


def test_an_index_of_another_bundle_is_refused_and_says_so(tmp_path: Path) -> None:
    Index.of(rows(2), keys(2), digest=DIGEST).save(tmp_path / "i.npz")
    with pytest.raises(InputError, match="bundle aaaaaaaaaaaa, and this one is bbbbbbbbbbbb") as error:
        Index.load(tmp_path / "i.npz", digest=OTHER)
    assert "embed" in error.value.fix


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "i.npz"
    Index.of(rows(2), keys(2)).save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        Index.of(rows(3), keys(3)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _other_format(path: Path) -> None:
    np.savez(path.open("wb"), embeddings=rows(1), facts=np.frombuffer(b'{"format": 99}', np.uint8))


def _object_array(path: Path) -> None:
    np.savez(path.open("wb"), embeddings=np.array([{}], object), facts=np.frombuffer(b"{}", np.uint8))


def _too_few_keys(path: Path) -> None:
    facts = b'{"format": 1, "digest": "", "dim": 8, "keys": ["one"]}'
    np.savez(path.open("wb"), embeddings=rows(2), facts=np.frombuffer(facts, np.uint8))


def _cut(path: Path) -> None:
    Index.of(rows(2), keys(2)).save(path)
    path.write_bytes(path.read_bytes()[:-30])


def _crafted(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in ("facts", "embeddings"):
            file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00\x06\x00{'a': (")


@pytest.mark.parametrize(
    "write",
    [
        _crafted,
        _other_format,
        _object_array,
        _too_few_keys,
        _cut,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("hello"),
    ],
    ids=["a broken header", "other format", "pickled objects", "too few keys", "cut short", "empty", "text"],
)
def test_a_file_that_is_no_index_is_refused_by_name(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "bad.npz")
    with pytest.raises(InputError, match=r"^bad\.npz: not a saved index"):
        Index.load(tmp_path / "bad.npz")


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Index.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("embeddings", "names", "says"),
    [
        (rows(2, 7), ["c", "d"], r"takes \[n, 8\]"),
        (rows(2), ["c"], "2 embeddings but 1 keys"),
        (rows(2), "cd", "2 embeddings but 1 keys"),
        (rows(2), ["c", 4], "key 1 is int"),
        (rows(2), ["c", "c"], "1 of 2 keys are there already"),
        (rows(2), ["c", "a"], "1 of 2 keys are there already"),
        (np.full((2, 8), np.nan), ["c", "d"], "embedding 0 holds NaN"),
    ],
    ids=["size", "too few keys", "one str as keys", "a key that is no str", "a key twice", "a known key", "NaN"],
)
def test_what_can_not_be_added_changes_nothing(embeddings: Any, names: Any, says: str) -> None:
    index = Index.of(rows(1), ["a"])
    with pytest.raises(InputError, match=says):
        index.add(embeddings, names)
    assert [h.key for h in index.search(rows(1))] == ["a"]


def test_queries_of_another_model_or_number_are_refused() -> None:
    index = Index.of(rows(3), keys(3))
    with pytest.raises(InputError, match=r"takes \[n, 8\]"):
        index.search(np.ones(7))
    with pytest.raises(InputError, match="one query is wanted, not 2"):
        index.search(rows(2))
    with pytest.raises(UsageError, match="k is 0"):
        index.search(rows(1), 0)
