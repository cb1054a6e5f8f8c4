"""Diff: what differs between two bundles, as far as their files tell: a, the one before, and b, the one after.

Nothing is run here; paired.py runs both on the same data. Needs PyYAML for the recipes; weights are compared one by
one where onnx_ir is there, else by the digests of their files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile import layer_table, manifest
from medcompile.bundle import Bundle
from medcompile.errors import BundleError
from medcompile.spec import Artifact, Evidence, GraphSpec, Margin, Variant, Verdict

if TYPE_CHECKING:
    import onnx_ir as ir

RECIPE = "recipe.resolved.yaml"


@dataclass(frozen=True)
class Change:
    """One thing that differs: its name, and what each bundle says; None where a bundle lacks it."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class WeightChange:
    """A stored tensor that differs between graphs of one variant and name.

    a, b: type and shape, `float32[384, 384]`; empty where that side lacks it. changed: how many of its elements;
    relative: norm of the change over the norm in a; largest: of the absolute changes. None where shapes or types
    differ. Integers are compared as they are stored.
    """

    variant: str
    graph: str
    name: str
    a: str
    b: str
    elements: int
    changed: int | None = None
    relative: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class PrecisionChange:
    """Layers of one graph and operator that went from precision a to b. Empty: not in that bundle."""

    variant: str
    graph: str
    op: str
    a: str
    b: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """An artifact's size on disk with all its files, and what was recorded of it on which machine."""

    size_bytes: int
    latency_ms: float | None
    machine: str
    verdict: Verdict | None


@dataclass(frozen=True)
class Recorded:
    """What both bundles recorded of one metric, each against its own original; None where one has no such."""

    target: str
    variant: str
    graph: str
    metric: str
    a: Evidence | None
    b: Evidence | None


@dataclass(frozen=True)
class Built:
    """The artifacts of one target, variant and graph."""

    target: str
    variant: str
    graph: str
    a: Figures | None
    b: Figures | None


@dataclass(frozen=True)
class Named:
    """Which bundle. relowered: how often targets were added to it after its build."""

    name: str
    root: str
    digest: str


@dataclass(frozen=True)
class Diff:
    """All that differs. files: by path, sha256 on each side. weights: None without onnx_ir, which reads them.
    metrics, artifacts: everything recorded, changed or not.

    same_items: True if both were judged on the same evaluation data, so that recorded values can be set side by side.
    notes: what could not be compared, and why.
    """

    a: Named
    b: Named
    identical: bool
    source: tuple[Change, ...]
    files: tuple[Change, ...]
    weights: tuple[WeightChange, ...] | None
    recipe: tuple[Change, ...]
    data: tuple[Change, ...]
    versions: tuple[Change, ...]
    budget: tuple[Change, ...]
    variants: tuple[Change, ...]
    precision: tuple[PrecisionChange, ...]
    metrics: tuple[Recorded, ...]
    artifacts: tuple[Built, ...]
    same_items: bool
    notes: tuple[str, ...]


def diff(a: Bundle, b: Bundle) -> Diff:
    """Raises BundleError where a file of one of them is not what it should be."""
    notes = list(_scope(a, b))
    weights = _weights(a, b)
    if weights is None:
        notes.append('weights are compared by the digests of their files alone: pip install "medcompile[build]"')
    return Diff(
        a=Named(a.name, str(a.root), a.digest),
        b=Named(b.name, str(b.root), b.digest),
        identical=a.digest == b.digest,
        source=changes(_source(a, b), _source(b, a)),
        files=changes({p: f.sha256 for p, f in a.files.items()}, {p: f.sha256 for p, f in b.files.items()}),
        weights=weights,
        recipe=_recipe_changes(a, b, notes),
        data=changes(_data(a), _data(b)),
        versions=changes(_versions(a, b), _versions(b, a)),
        budget=changes(_budget(a), _budget(b)),
        variants=changes(_variants(a, b), _variants(b, a)),
        precision=tuple(_precision(a, b)),
        metrics=tuple(_recorded(a, b)),
        artifacts=tuple(_built(a, b)),
        same_items=same_items(a, b),
        notes=tuple(notes),
    )


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    """Every key, dotted where mappings are nested, of which a and b say different things; in a's order, then b's."""
    left, right = dict(_flat(a)), dict(_flat(b))
    keys = dict.fromkeys([*left, *right])
    return tuple(Change(k, left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k))


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{before}{key}.")
        else:
            yield f"{before}{key}", inner


def same_items(a: Bundle, b: Bundle) -> bool:
    """True if both were judged on the same evaluation data."""
    ours, theirs = ((found.provenance.get("evaluation") or {}).get("digest") for found in (a, b))
    return ours is not None and ours == theirs


def budget(found: Bundle) -> tuple[Margin, ...]:
    """The budget as the recipe has it, where the bundle holds that: a search tests at a higher confidence, which allows
    for its looks, and leaves that one in the manifest. Raises BundleError."""
    asked = (_recipe(found) or {}).get("budget")
    return tuple(Margin(name, **keys) for name, keys in asked.items()) if asked else found.budget


def files_under(found: Bundle, folder: str) -> dict[str, str]:
    """sha256 by path."""
    return {path: found.files[path].sha256 for path in found.under(folder)}


# ---- one section each


def _scope(a: Bundle, b: Bundle) -> Iterator[str]:
    """What only one of them has, so that nothing can be set beside it."""
    for what, ours, theirs in (
        ("graph", a.graphs, b.graphs),
        ("variant", a.variants, b.variants),
        ("target", {x.target.name for x in a.artifacts}, {x.target.name for x in b.artifacts}),
    ):
        for name in sorted(set(ours) ^ set(theirs)):
            yield f"{what} {name} is only in {'a' if name in ours else 'b'}"
    if not same_items(a, b):
        yield "a and b were judged on different evaluation data, so recorded values can't be set against each other"


def _source(found: Bundle, other: Bundle) -> dict[str, Any]:
    """Where the weights came from, and the faces of the graphs that the other has as well."""
    known = found.provenance
    return {
        "family": found.family,
        "tasks": list(found.tasks),
        "source": known.get("source"),
        "revision": known.get("revision"),
        "files": known.get("source_files") or {},
        "graphs": {name: _face(spec) for name, spec in found.graphs.items() if name in other.graphs},
    }


def _face(spec: GraphSpec) -> dict[str, Any]:
    sides = {"inputs": spec.inputs, "outputs": spec.outputs}
    face: dict[str, Any] = {
        side: ", ".join(f"{t.name} {t.dtype}[{', '.join(map(str, t.shape))}]" for t in tensors)
        for side, tensors in sides.items()
    }
    return face | {"shapes": {p.name: {x.name: [x.min, x.opt, x.max] for x in p.axes} for p in spec.profiles}}


def _data(found: Bundle) -> dict[str, Any]:
    """Every data set that the provenance tells of, by its part in the build."""
    return {k: v for k, v in found.provenance.items() if isinstance(v, Mapping) and "digest" in v}


def _versions(found: Bundle, other: Bundle) -> dict[str, Any]:
    """Of the libraries that compiled it, and of those that its artifacts for targets of both were built with."""
    shared = {x.target.name for x in other.artifacts}
    machines = {x.target.name: manifest.encode(x.target) for x in found.artifacts if x.target.name in shared}
    return {"built with": found.provenance.get("versions") or {}, "targets": machines}


def _budget(found: Bundle) -> dict[str, Any]:
    return {m.metric: {k: v for k, v in manifest.encode(m).items() if k != "metric" and v != {}} for m in budget(found)}


def _variants(found: Bundle, other: Bundle) -> dict[str, Any]:
    """What differs from a plain float32 variant; in words where the other bundle has none of that name."""
    return {
        name: manifest.encode(v) if name in other.variants else ", ".join(f"{k}={w}" for k, w in told(v).items())
        for name, v in found.variants.items()
    }


def told(variant: Variant) -> dict[str, Any]:
    """What the variant says that a plain float32 one does not."""
    plain = manifest.encode(Variant(variant.name))
    said = {k: v for k, v in manifest.encode(variant).items() if v != plain[k]}
    return said or {"float_dtype": variant.float_dtype.value}


def _recipe_changes(a: Bundle, b: Bundle, notes: list[str]) -> tuple[Change, ...]:
    """Variants last, for they are many keys and have a section of their own."""
    recipes = [_recipe(found) for found in (a, b)]
    notes += [
        f"{side} holds no {RECIPE}, so recipes are not compared"
        for side, r in zip("ab", recipes, strict=True)
        if r is None
    ]
    ours, theirs = recipes
    if ours is None or theirs is None:
        return ()
    return tuple(sorted(changes(ours, theirs), key=lambda change: change.key.startswith("variants.")))


def _recipe(found: Bundle) -> Mapping[str, Any] | None:
    import yaml

    if RECIPE not in found.files:
        return None
    try:
        document = yaml.safe_load((found.root / RECIPE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"{found.root}: {RECIPE} is not YAML: {error}", fix="rebuild the bundle") from error
    return document if isinstance(document, Mapping) else {"": document}


def _precision(a: Bundle, b: Bundle) -> Iterator[PrecisionChange]:
    ours, theirs = layer_table.read(a), layer_table.read(b)
    for variant, graph in ((v, g) for v in ours if v in theirs for g in ours[v] if g in theirs[v]):
        left, right = ({r["name"]: r for r in table[variant][graph]} for table in (ours, theirs))
        moved: dict[tuple[str, str, str], list[str]] = {}
        for name in dict.fromkeys([*left, *right]):
            before, after = left.get(name), right.get(name)
            was, now = (row["precision"] if row else "" for row in (before, after))
            if was != now:
                moved.setdefault(((before or after or {})["op"], was, now), []).append(name)
        for (op, was, now), names in moved.items():
            yield PrecisionChange(variant, graph, op, was, now, tuple(names))


def _recorded(a: Bundle, b: Bundle) -> Iterator[Recorded]:
    left, right = (
        {(x.target.name, x.variant, x.graph, e.metric): e for x in found.artifacts for e in x.evidence}
        for found in (a, b)
    )
    for key in dict.fromkeys([*left, *right]):
        yield Recorded(*key, left.get(key), right.get(key))


def _built(a: Bundle, b: Bundle) -> Iterator[Built]:
    left, right = (
        {(x.target.name, x.variant, x.graph): _figures(found, x) for x in found.artifacts} for found in (a, b)
    )
    for key in dict.fromkeys([*left, *right]):
        yield Built(*key, left.get(key), right.get(key))


def _figures(found: Bundle, artifact: Artifact) -> Figures:
    size = sum(found.files[path].size for path in found.under(found.folder_of(artifact)))
    target = artifact.target
    machine = f"{target.device} {target.arch}, {target.os}, {target.backend} {target.version}; {artifact.verified_on}"
    return Figures(size, artifact.latency_ms, machine, artifact.verdict)


# ---- weights


def _weights(a: Bundle, b: Bundle) -> tuple[WeightChange, ...] | None:
    """Tensor by tensor, of graphs that both have and whose files differ."""
    pairs = []
    for variant in (v for v in a.variants if v in b.variants):
        if files_under(a, f"graphs/{variant}") != files_under(b, f"graphs/{variant}"):
            names = (f"graphs/{variant}/{graph}.onnx" for graph in a.graphs)
            pairs += [(variant, Path(name)) for name in names if name in a.files and name in b.files]
    if not pairs:
        return ()
    try:
        import onnx_ir  # noqa: F401
    except ImportError:
        return None
    from medcompile import onnx_files

    found: list[WeightChange] = []
    for variant, path in pairs:
        found += _tensors(variant, path.stem, *(onnx_files.load(side.root / path) for side in (a, b)))
    return tuple(found)


def _tensors(variant: str, graph: str, a: ir.Model, b: ir.Model) -> Iterator[WeightChange]:
    left, right = (
        {str(n): v.const_value for n, v in model.graph.initializers.items() if v.const_value is not None}
        for model in (a, b)
    )
    for name in dict.fromkeys([*left, *right]):
        found = _tensor(WeightChange(variant, graph, name, "", "", 0), left.get(name), right.get(name))
        if found is not None:
            yield found


def _tensor(place: WeightChange, a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> WeightChange | None:
    """None where they are the same."""
    from dataclasses import replace

    import numpy as np

    faces = ["" if t is None else f"{t.dtype.numpy().name}{list(t.shape.numpy())}" for t in (a, b)]
    known = a if a is not None else b
    assert known is not None
    place = replace(place, a=faces[0], b=faces[1], elements=known.size)
    if a is None or b is None or faces[0] != faces[1]:
        return place
    before, after = a.numpy(), b.numpy()
    if before.tobytes() == after.tobytes():
        return None
    before, after = before.astype(np.float64), after.astype(np.float64)
    moved = after - before
    size = float(np.linalg.norm(before))
    return replace(
        place,
        changed=int(np.count_nonzero(moved)),
        relative=float(np.linalg.norm(moved)) / size if size else None,
        largest=float(np.abs(moved).max()),
    )


def counted(found: tuple[Change, ...]) -> Counter[tuple[str, str]]:
    """How many files were added, removed or changed, by the folder that means something to a reader."""
    kinds = ((_area(c.key), "added" if c.a is None else "removed" if c.b is None else "changed") for c in found)
    return Counter(sorted(kinds))


def _area(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[: {"graphs": 2, "artifacts": 3}.get(parts[0], 1)]) + ("/" if len(parts) > 1 else "")
