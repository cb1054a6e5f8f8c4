"""The layer table of a bundle (layers.json) as `diff` and `explain` read it, and names of many layers in few words.

Which precision a layer has is written by passes/layers.py; a node that quantization renamed is known here by its old
name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from medcompile.bundle import Bundle
from medcompile.errors import BundleError

FILE = "layers.json"

Row = Mapping[str, str]
"""name, op and precision of one layer."""

_NUMBER = re.compile(r"\d+")


def read(found: Bundle) -> dict[str, dict[str, list[Row]]]:
    """By variant and graph, the layers in graph order; empty where the bundle has no table. Raises BundleError."""
    if FILE not in found.files:
        return {}
    try:
        table = json.loads((found.root / FILE).read_bytes())
        return {v: {g: [_row(r) for r in rows] for g, rows in graphs.items()} for v, graphs in table.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BundleError(f"{found.root}: {FILE} is no table of layers: {error}", fix="rebuild the bundle") from error


def _row(row: Mapping[str, str]) -> Row:
    return {"name": row["name"].removesuffix("/integer"), "op": row["op"], "precision": row["precision"]}


def pattern(name: str) -> str:
    """The name with a * for every number: equal for the same layer of every block."""
    return _NUMBER.sub("*", name)


def folded(names: Sequence[str]) -> str:
    """Names of one pattern as one: `encoder.layer.0-2,5.output.dense`. A number that varies along with another is *."""
    if len(set(names)) == 1:
        return names[0]
    columns = [set(column) for column in zip(*map(_NUMBER.findall, names), strict=True)]
    several = sum(len(column) > 1 for column in columns) > 1
    told = ["*" if several and len(column) > 1 else ranges(map(int, column)) for column in columns]
    return "".join(part + number for part, number in zip(_NUMBER.split(names[0]), [*told, ""], strict=True))


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2 and 5 as `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def groups(names: Iterable[str]) -> list[str]:
    """All names in few words: those of one pattern as one, in the order in which they first come."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pattern(name), []).append(name)
    return [folded(alike) for alike in found.values()]
