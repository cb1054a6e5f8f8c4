"""The record of a search: what was tried, what it cost and lost, what was confirmed, and why each layer is as it is.

Plain dataclasses, written to a bundle's search.json by the build and read by its report and `medcompile explain`.
Nothing here names an item of the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medcompile import manifest
from medcompile.errors import BundleError
from medcompile.spec import Evidence, Variant

FILE = "search.json"
"""Where a bundle holds its searches, one for each target."""

UNITS = {"latency": "ms", "throughput": "ms", "size": "bytes"}
"""What Point.cost is counted in, by objective: of throughput, milliseconds for each row of a full batch."""


@dataclass(frozen=True)
class Alternative:
    """A format that a group of layers could have had. format: as in Point.formats (`float`, `int8`, `int4-g32`).

    error: what this format does alone to the graph's outputs, the norm of the change over their norm, on calibration
    data. cost: of the whole bundle if this group alone changed to it, less what the chosen one costs, by the cost model
    that was fitted to the measured points; in the objective's unit, negative where it would be cheaper.
    """

    format: str
    error: float
    cost: float


@dataclass(frozen=True)
class LayerChoice:
    """A group of linear layers that read one tensor, the format that it got, and what else it could have been.

    why: one sentence, complete by itself.
    """

    graph: str
    nodes: tuple[str, ...]
    format: str
    error: float
    alternatives: tuple[Alternative, ...]
    why: str


@dataclass(frozen=True)
class Point:
    """A bundle that was tried. variant: all that decides its numbers. formats: how many groups of layers have which.

    cost: measured, in the objective's unit; None where the target is elsewhere. predicted: by the cost model.
    error: of the graph's outputs on calibration data, as in Alternative. tuning: its evidence on the tuning data, empty
    where that was not asked. passed: whether the search took it for good enough there; None where it was not asked.
    why: what the search made of it, one sentence.
    """

    name: str
    variant: Variant
    formats: dict[str, int]
    cost: float | None
    predicted: float | None
    size_bytes: int
    error: float | None
    tuning: tuple[Evidence, ...]
    passed: bool | None
    why: str


@dataclass(frozen=True)
class Look:
    """One look at the acceptance data: a point tested at a confidence that allows for all looks there may be."""

    number: int
    point: str
    confidence: tuple[float, ...]
    evidence: tuple[Evidence, ...]
    accepted: bool


@dataclass(frozen=True)
class Search:
    """A search for one target.

    basis: how costs came about: `measured on this machine`, or which cost model. chosen: a point's name; empty where
    none was confirmed. variant: the name in the bundle of that point, or of the one looked at last; empty where no look
    was taken. most_looks: how many looks at the acceptance data were allowed, whether or not they were taken. seconds:
    of the search, without what the cache had already.
    """

    target: str
    objective: str
    basis: str
    reference: str
    points: tuple[Point, ...]
    layers: tuple[LayerChoice, ...]
    looks: tuple[Look, ...]
    most_looks: int
    chosen: str
    variant: str
    seconds: float
    notes: tuple[str, ...] = ()

    def point(self, name: str) -> Point:
        return next(p for p in self.points if p.name == name)


@dataclass(frozen=True)
class Record:
    """All of search.json."""

    searches: tuple[Search, ...] = ()
    version: int = field(default=1)


def write(path: Path, searches: tuple[Search, ...]) -> None:
    text = json.dumps(manifest.encode(Record(searches)), indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> tuple[Search, ...]:
    """Raises BundleError if it is no record of this version."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        found: Record = manifest.decode(Record, value, path.name)
    except (OSError, ValueError, manifest.Malformed) as error:
        raise BundleError(f"{path.name}: {error}", fix="build the bundle again") from error
    if found.version != 1:
        raise BundleError(f"{path.name}: version {found.version}, and this reads 1", fix="update medcompile")
    return found.searches
