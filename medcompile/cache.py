"""The build cache: content-addressed folders, one per finished step, each complete or absent.

A step's key is a digest over everything that decides its result, so an entry never goes stale and is never changed.
An entry is filled under a temporary name and renamed when it is whole: a killed build leaves no half entry, and two
builds that make the same one both end with it. What is inside an entry is the business of whoever made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile import manifest, onnx_files, statistics, stored
from medcompile.bundle import lock_folder
from medcompile.program import Graph, Program
from medcompile.spec import GraphSpec, Stage

if TYPE_CHECKING:
    import numpy as np

_LISTING = "entry.json"


def key(*parts: object) -> str:
    """A digest over JSON-able parts, in order."""
    text = json.dumps(manifest.encode(parts), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Finished steps under root. Safe for any number of processes at once."""

    root: Path

    def entry(self, name: str) -> Path | None:
        """The folder of that key, if the step was finished once and every file of it is still there."""
        folder = self._place(name)
        if folder.is_dir() and not _whole(folder):
            self._discard(folder)
        return folder if folder.is_dir() else None

    def put(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Let fill write into an empty folder, and keep that folder under the key. Returns where it lies then."""
        place = self._place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        lock = -1
        while lock < 0:
            fresh = self.root / f"tmp-{os.getpid()}-{secrets.token_hex(4)}"
            fresh.mkdir()
            lock = lock_folder(fresh)
        try:
            fill(fresh)
            (fresh / _LISTING).write_text(json.dumps(_sizes(fresh)), encoding="utf-8")
            try:
                fresh.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            os.close(lock)
        return place

    def _place(self, name: str) -> Path:
        return self.root / name[:2] / name

    def _discard(self, folder: Path) -> None:
        """Take away an entry of which files are gone or cut (by a cleaner of old files, say), unless it is mended."""
        lock = lock_folder(self.root, wait=True)
        try:
            if folder.is_dir() and not _whole(folder):
                gone = self.root / f"tmp-{os.getpid()}-{secrets.token_hex(4)}"
                folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        finally:
            os.close(lock)

    def _remove_leftovers(self) -> None:
        """Folders of builds that were killed: a running build holds the lock of its own."""
        for folder in self.root.glob("tmp-*"):
            lock = lock_folder(folder)
            if lock >= 0:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _LISTING)
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def _whole(folder: Path) -> bool:
    try:
        listed = json.loads((folder / _LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(listed == _sizes(folder))


def write_program(program: Program, folder: Path) -> None:
    """Graphs, weights, statistics and stored formats of a program. An exported one's weights stay in the checkpoint."""
    import numpy as np

    models = {name: graph.model for name, graph in program.graphs.items()}
    onnx_files.save(models, folder, keep_references=program.stage is Stage.EXPORTED)
    for graph, tensors in program.statistics.items():
        arrays = {
            f"{tensor}\t{part}": array
            for tensor, s in tensors.items()
            for part, array in statistics.to_arrays(s).items()
        }
        np.savez(folder / f"{graph}.statistics.npz", **arrays)  # type: ignore[arg-type]
    for graph, table in program.stored.items():
        np.savez(folder / f"{graph}.stored.npz", **stored.to_arrays(table))  # type: ignore[arg-type]
    face = {
        "family": program.family,
        "stage": program.stage.name,
        "graphs": {name: manifest.encode(graph.spec) for name, graph in program.graphs.items()},
        "statistics": sorted(program.statistics),
        "stored": sorted(program.stored),
    }
    (folder / "program.json").write_text(json.dumps(face, sort_keys=True), encoding="utf-8")


def read_program(folder: Path) -> Program:
    """What write_program() wrote, weights memory-mapped."""
    face = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    graphs = {}
    for name, spec in face["graphs"].items():
        graphs[name] = Graph(manifest.decode(GraphSpec, spec, name), onnx_files.load(folder / f"{name}.onnx"))
    read = {graph: _read_statistics(folder / f"{graph}.statistics.npz") for graph in face["statistics"]}
    kept = {graph: _read_stored(folder / f"{graph}.stored.npz") for graph in face.get("stored", ())}
    return Program(face["family"], graphs, Stage[face["stage"]], read, kept)


def _read_stored(path: Path) -> Mapping[str, stored.StoredLinear]:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return stored.from_arrays(arrays)


def _read_statistics(path: Path) -> Mapping[str, Any]:
    import numpy as np

    tensors: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            tensor, _, part = name.partition("\t")
            tensors.setdefault(tensor, {})[part] = arrays[name]
    return {tensor: statistics.from_arrays(parts) for tensor, parts in tensors.items()}
