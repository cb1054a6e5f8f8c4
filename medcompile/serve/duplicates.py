"""Which records of a batch bear the same custom_id, found in a file of digests of any length, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_PAIR = np.dtype([("high", "<u8"), ("low", "<u8")])
PASS_RECORDS = 1 << 20
"""As many digests are sorted at a time, about; more of them take more passes over the file."""
TOLD = 10

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Duplicates:
    """count: records whose custom_id another one had before. pairs: some of these, with the first of that id."""

    count: int = 0
    pairs: tuple[tuple[int, int], ...] = ()


def find(path: Path) -> Duplicates:
    """path: 16 bytes for each record, which are numbered from 1."""
    records = path.stat().st_size // _PAIR.itemsize
    passes = max(1, -(-records // PASS_RECORDS))
    count = 0
    pairs: list[tuple[int, int]] = []
    for number in range(passes):
        digests, places = _part(path, number, passes)
        order = np.lexsort((places, digests["low"], digests["high"]))
        digests, places = digests[order], places[order]
        same = digests[1:] == digests[:-1]
        count += int(same.sum())
        begins = np.flatnonzero(np.concatenate(([True], ~same)))
        for at in np.flatnonzero(same)[:TOLD] + 1:
            first = begins[np.searchsorted(begins, at, side="right") - 1]
            pairs.append((int(places[first]), int(places[at])))
    return Duplicates(count, tuple(sorted(pairs, key=lambda pair: pair[1])[:TOLD]))


def _part(path: Path, number: int, passes: int) -> tuple[Array, Array]:
    """The digests of one share of all that there can be, with their records' numbers."""
    found = [
        (chunk[mine], first + 1 + np.flatnonzero(mine))
        for chunk, first in _chunks(path)
        for mine in [chunk["high"] % np.uint64(passes) == number]
    ]
    if not found:
        return np.zeros(0, _PAIR), np.zeros(0, np.int64)
    return np.concatenate([digests for digests, _ in found]), np.concatenate([places for _, places in found])


def _chunks(path: Path) -> Iterator[tuple[Array, int]]:
    first = 0
    with path.open("rb") as file:
        while len(chunk := np.fromfile(file, _PAIR, PASS_RECORDS)):
            yield chunk, first
            first += len(chunk)
