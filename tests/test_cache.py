"""The build cache: entries whole or absent, keys that see everything, and programs that come back as they went in."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medcompile import cache
from medcompile.cache import Cache
from medcompile.passes.quantize import Quantize
from medcompile.spec import Stage, Variant
from tests.tiny import Workshop

KEY = cache.key("a step")


def fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep/a.bin").write_bytes(b"12345")
    (folder / "b.bin").write_bytes(b"")


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "build")


def test_an_entry_is_found_by_its_key_alone(store: Cache) -> None:
    assert store.entry(KEY) is None
    place = store.put(KEY, fill)
    assert store.entry(KEY) == place
    assert (place / "deep/a.bin").read_bytes() == b"12345"
    assert store.entry(cache.key("another")) is None


def test_a_fill_that_fails_leaves_nothing(store: Cache) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        store.put(KEY, broken)
    assert store.entry(KEY) is None
    assert [p for p in store.root.rglob("*") if p.is_file()] == []


def cut(place: Path) -> None:
    (place / "deep/a.bin").write_bytes(b"123")


def lose(place: Path) -> None:
    (place / "b.bin").unlink()


def lose_listing(place: Path) -> None:
    (place / "entry.json").write_text("{")


def lose_all(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


@pytest.mark.parametrize("damage", [cut, lose, lose_listing, lose_all])
def test_an_entry_that_lost_files_counts_as_absent_and_is_made_again(
    store: Cache, damage: Callable[[Path], None]
) -> None:
    damage(store.put(KEY, fill))
    assert store.entry(KEY) is None
    assert store.entry(store.put(KEY, fill).name) is not None


def _fill_and_hang(root: Path) -> None:
    def hang(folder: Path) -> None:
        fill(folder)
        (root / "filled").touch()
        time.sleep(60)

    Cache(root).put(KEY, hang)


def test_what_a_killed_build_left_goes_with_the_next_step_and_a_running_ones_stays(store: Cache) -> None:
    store.root.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=_fill_and_hang, args=(store.root,))
    process.start()
    while not (store.root / "filled").exists():
        time.sleep(0.01)
        assert process.is_alive()
    store.put(cache.key("another"), fill)
    assert len(list(store.root.glob("tmp-*"))) == 1
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store.put(cache.key("a third"), fill)
    assert list(store.root.glob("tmp-*")) == []
    assert store.entry(KEY) is None


def test_two_that_make_the_same_entry_both_end_with_it(store: Cache) -> None:
    def meanwhile(folder: Path) -> None:
        store.put(KEY, fill)
        fill(folder)

    assert store.put(KEY, meanwhile) == store.entry(KEY)
    assert list(store.root.glob("tmp-*")) == []


def test_a_key_sees_order_nesting_types_and_every_field() -> None:
    variant = Variant("int8")
    keys = [
        cache.key("a", "b"),
        cache.key("b", "a"),
        cache.key(("a", "b")),
        cache.key("ab"),
        cache.key(1),
        cache.key("1"),
        cache.key(None),
        cache.key(variant),
        cache.key(Variant("int8", symmetric=False)),
        cache.key(Variant("int8", compute={"float": "bfloat16"})),
        cache.key(Quantize("mse")),
        cache.key(Quantize("mse", 99.0)),
    ]
    assert len(set(keys)) == len(keys)
    assert cache.key({"x": 1, "y": 2}) == cache.key({"y": 2, "x": 1})


def test_a_program_comes_back_from_the_cache_with_its_statistics(small: Workshop, tmp_path: Path) -> None:
    import numpy as np

    entries = [p.parent for p in (small.cache / "build").rglob("program.json")]
    programs = [cache.read_program(folder) for folder in entries]
    calibrated = next(p for p in programs if p.stage is Stage.CALIBRATED)
    cache.write_program(calibrated, tmp_path)
    again = cache.read_program(tmp_path)
    assert again.graphs["embed"].spec == calibrated.graphs["embed"].spec
    assert list(again.statistics["embed"]) == list(calibrated.statistics["embed"])
    for name, statistics in calibrated.statistics["embed"].items():
        for ours, theirs in zip(vars(statistics).values(), vars(again.statistics["embed"][name]).values(), strict=True):
            assert np.array_equal(ours, theirs)
