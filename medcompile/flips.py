"""flips.json of a bundle: which items each artifact decides differently from the original, by name and never by text.

What a flip is, and of which kind, is said in metrics/decisions.py; what an item is called, by its exam.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

FILE = "flips.json"
MOST = 1_000
"""Flips kept of one artifact, harmful ones first."""

Flips = Sequence[tuple[str, str]]
"""Items' names, each with how its decision flipped: harmful, other or healed."""

_ORDER = ("harmful", "other", "healed")


def ranked(flips: Flips) -> tuple[tuple[str, str], ...]:
    """What is kept of them."""
    return tuple(sorted(flips, key=lambda flip: _ORDER.index(flip[1]))[:MOST])


def write(path: Path, by_artifact: Mapping[str, Flips]) -> None:
    """by_artifact: by an artifact's path in the bundle."""
    path.write_text(json.dumps(by_artifact, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def renewed(root: Path, by_artifact: Mapping[str, Flips], paths: Iterable[str]) -> Iterator[dict[str, Path]]:
    """The file that the bundle at root should have, by its name in there, while the context lasts; none if it would be
    empty. by_artifact: what is new. paths: the artifacts that the bundle will have."""
    old = root / FILE
    known = json.loads(old.read_text(encoding="utf-8")) if old.is_file() else {}
    kept = {path: flips for path, flips in {**known, **by_artifact}.items() if path in set(paths)}
    with TemporaryDirectory() as folder:
        if kept:
            write(Path(folder) / FILE, kept)
        yield {FILE: Path(folder) / FILE} if kept else {}
