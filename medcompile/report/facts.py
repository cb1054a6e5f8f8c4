"""The facts of a bundle's report: everything that report.html and evidence.json say, gathered once from the bundle.

Numbers, names and digests only, never an item's text. No clock and nothing of the manifest's own digest, so that the
same bundle always gives the same facts. How they are put is words.py's, figures.py's and the template's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from medcompile import flips, layer_table, manifest
from medcompile.bundle import Contents
from medcompile.errors import BundleError
from medcompile.passes.clipping import Clipping
from medcompile.search import record
from medcompile.spec import Artifact, Margin, Variant

CALIBRATION = "calibration.json"

ROLES = {
    "calibration": ("calibration", "ranges and scales were taken from it"),
    "tuning": ("tuning", "the search chose by it"),
    "evaluation": ("acceptance", "the evidence was made on it"),
}
"""The roles of data in a build, by the key of a bundle's provenance, and what for."""

_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "Gemm", "Conv", "MatMulNBits"})


@dataclass(frozen=True)
class DataRole:
    """A data set and the role that it had in the build. use: what for. marked, phi: the role that its manifest gives
    it, and what that states of patient information."""

    role: str
    use: str
    marked: str
    name: str
    items: int
    digest: str
    licence: str
    phi: str
    source: str


@dataclass(frozen=True)
class Layers:
    """Operators of one kind in one precision. names: each product of matrices, and of the rest none; those that differ
    in a number only are told as one, `encoder.layer.0-5.output.dense`."""

    op: str
    precision: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """precision, clipping: by variant and graph. flips: by an artifact's path, as flips.json has them.

    folder_bytes: of all that an artifact needs, by its path. weights: digests of the original's files. shared_items:
    how many items stand in more than one data set; None where the build did not count them.
    """

    name: str
    family: str
    tasks: tuple[str, ...]
    budget: tuple[Margin, ...]
    variants: Mapping[str, Variant]
    artifacts: tuple[Artifact, ...]
    folder_bytes: Mapping[str, int]
    data: tuple[DataRole, ...]
    shared_items: int | None
    searches: tuple[record.Search, ...]
    precision: Mapping[str, Mapping[str, tuple[Layers, ...]]]
    clipping: Mapping[str, Mapping[str, tuple[Clipping, ...]]]
    flips: Mapping[str, tuple[tuple[str, str], ...]]
    provenance: Mapping[str, Any]

    @property
    def judged(self) -> bool:
        return any(a.verdict is not None for a in self.artifacts)


def gather(contents: Contents, root: Path) -> Facts:
    """The facts of the bundle whose files, all but its texts and manifest, lie at root.

    Raises BundleError where one of them is not what the build writes.
    """
    # As bundle.json will give them back, so that the page is the same when it is rendered from there.
    contents = manifest.decode(Contents, json.loads(json.dumps(manifest.encode(_plain(contents)))), "")
    provenance = contents.provenance
    return Facts(
        name=contents.name,
        family=contents.family,
        tasks=contents.tasks,
        budget=contents.budget,
        variants=contents.variants,
        artifacts=contents.artifacts,
        folder_bytes={a.path: _folder_bytes(root / a.path) for a in contents.artifacts},
        data=tuple(_role(role, provenance[role]) for role in ROLES if provenance.get(role)),
        shared_items=provenance.get("shared_items"),
        searches=record.read(root / record.FILE) if (root / record.FILE).is_file() else (),
        precision=_precision(root / layer_table.FILE),
        clipping=_decoded(Mapping[str, Mapping[str, tuple[Clipping, ...]]], root / CALIBRATION),
        flips=_decoded(Mapping[str, tuple[tuple[str, str], ...]], root / flips.FILE),
        provenance={k: v for k, v in provenance.items() if k not in ROLES},
    )


def _plain(contents: Contents) -> Contents:
    return Contents(**{field.name: getattr(contents, field.name) for field in fields(Contents)})


def evidence_text(facts: Facts, verdict: Any) -> str:
    """evidence.json: the facts, and verdict, which is what the report makes of them in words."""
    plain = {"version": 1, **manifest.encode(facts), "verdict": manifest.encode(verdict)}
    plain["artifacts"] = [_artifact(a, facts.folder_bytes[a.path]) for a in facts.artifacts]
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def _artifact(artifact: Artifact, folder_bytes: int) -> dict[str, Any]:
    plain: dict[str, Any] = manifest.encode(artifact)
    target = {"target": artifact.target.name, "machine": plain["target"]}
    return plain | target | {"verdict": artifact.verdict, "folder_bytes": folder_bytes}


def _role(role: str, told: Mapping[str, Any]) -> DataRole:
    return DataRole(
        role=ROLES[role][0],
        use=ROLES[role][1],
        marked=str(told.get("role", "")),
        name=str(told.get("name", "")),
        items=int(told.get("items", 0)),
        digest=str(told.get("digest", "")),
        licence=str(told.get("licence", "")),
        phi=str(told.get("phi", "")),
        source=str(told.get("source", "")),
    )


def _precision(path: Path) -> dict[str, dict[str, tuple[Layers, ...]]]:
    return {variant: {g: _layers(rows) for g, rows in graphs.items()} for variant, graphs in _json(path).items()}


def _layers(rows: list[layer_table.Row]) -> tuple[Layers, ...]:
    kinds: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        by_pattern = kinds.setdefault((row["op"], row["precision"]), {})
        name = row["name"].removesuffix("/integer").removesuffix("/MatMul")
        by_pattern.setdefault(layer_table.pattern(name), []).append(name)
    return tuple(
        Layers(op, precision, sum(map(len, found.values())), _folded(found) if op in _PRODUCTS else ())
        for (op, precision), found in sorted(kinds.items())
    )


def _folded(by_pattern: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(layer_table.folded(names) for names in by_pattern.values())


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())


def _json(path: Path) -> Any:
    """The file's content; of one that is not there, nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise BundleError(f"{path.name}: {error}", fix="rebuild the bundle") from error


def _decoded(hint: Any, path: Path) -> Any:
    try:
        return manifest.decode(hint, _json(path), path.name)
    except manifest.Malformed as error:
        raise BundleError(str(error), fix="rebuild the bundle with this version of medcompile") from error
