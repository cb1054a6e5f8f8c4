"""Explain: why each layer of a bundle has its precision, and what another one would cost.

Where a search chose (search.json), its record tells; else the rule of the recipe is found again from the variant and
the table of layers. Nothing is run or measured here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from medcompile import layer_table
from medcompile.bundle import Bundle
from medcompile.errors import UsageError
from medcompile.search import record
from medcompile.search.record import LayerChoice, Search
from medcompile.spec import LayerRule, Precision, Variant, kept

_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")
_NUMBERS = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?\s?%?")


@dataclass(frozen=True)
class Ruled:
    """Layers of one operator that have one precision by one rule. why: which, in words."""

    variant: str
    graph: str
    op: str
    precision: str
    why: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """An alternative of several groups of layers: the least and the most that it does to error and cost."""

    format: str
    error: tuple[float, float]
    cost: tuple[float, float]


@dataclass(frozen=True)
class Folded:
    """Groups of layers of one graph with one format for one reason, told as one. groups: how many; layers: their names,
    folded. alike: False where the reasons differ in their figures, and why is the first one's."""

    graph: str
    layers: tuple[str, ...]
    groups: int
    format: str
    error: tuple[float, float]
    alternatives: tuple[Range, ...]
    why: str
    alike: bool


@dataclass(frozen=True)
class Explanation:
    """searches: by target, with the layers that were asked about. rules: by variant, graph and precision."""

    searches: tuple[Search, ...]
    rules: tuple[Ruled, ...]
    notes: tuple[str, ...] = ()


def explain(found: Bundle, layer: str | None = None) -> Explanation:
    """layer: a glob over layers' names; None is all. Of a bundle that a search made, what rule holds is told only where
    layers were asked for, and of its yardstick never.

    Raises BundleError on a record that can't be read, UsageError where no layer has such a name.
    """
    searches = record.read(found.root / record.FILE) if record.FILE in found.files else ()
    table = layer_table.read(found)
    yardsticks = {search.reference for search in searches}
    asked = [v for v in found.variants if not searches or (layer is not None and v not in yardsticks)]
    rules = tuple(_ruled(found, table, asked))
    names = [n for s in searches for c in s.layers for n in c.nodes] + [n for r in rules for n in r.layers]
    notes = []
    if layer is not None:
        if not any(kept(name, (layer,)) for name in names):
            likely = [n for n in dict.fromkeys(names) if n.endswith("/MatMul")] or names
            raise UsageError(
                f"{found.name} has no layer {layer!r}",
                fix=f"use names such as {', '.join(likely[:3]) or 'none'}, or globs over them",
            )
        searches = tuple(replace(s, layers=_matching(s.layers, layer)) for s in searches)
        rules = tuple(
            replace(r, layers=named) for r in rules if (named := tuple(n for n in r.layers if kept(n, (layer,))))
        )
    if not searches:
        notes.append(
            "no search was made for this bundle, so what another precision would cost was not measured: `optimize:` in"
            " the recipe makes one, and `medcompile verify --layers` shows where a variant leaves float32"
        )
    if not table:
        notes.append(f"the bundle holds no {layer_table.FILE}, so nothing is known of single layers")
    return Explanation(searches, rules, tuple(notes))


def _matching(choices: Sequence[LayerChoice], layer: str) -> tuple[LayerChoice, ...]:
    return tuple(c for c in choices if any(kept(node, (layer,)) for node in c.nodes))


# ---- what a search chose


def folded(choices: Sequence[LayerChoice]) -> tuple[Folded, ...]:
    """The same choices in fewer rows: those that differ only in the numbers of their names and figures are one."""
    alike: dict[tuple[object, ...], list[LayerChoice]] = {}
    for choice in choices:
        names = tuple(map(layer_table.pattern, choice.nodes))
        formats = tuple(sorted(a.format for a in choice.alternatives))
        key = (choice.graph, names, choice.format, formats, _NUMBERS.sub("#", choice.why))
        alike.setdefault(key, []).append(choice)
    return tuple(map(_fold, alike.values()))


def _fold(choices: Sequence[LayerChoice]) -> Folded:
    first = choices[0]
    options = [[a for c in choices for a in c.alternatives if a.format == o.format] for o in first.alternatives]
    return Folded(
        graph=first.graph,
        layers=tuple(layer_table.folded([c.nodes[i] for c in choices]) for i in range(len(first.nodes))),
        groups=len(choices),
        format=first.format,
        error=_ends(c.error for c in choices),
        alternatives=tuple(
            Range(same[0].format, _ends(a.error for a in same), _ends(a.cost for a in same)) for same in options
        ),
        why=first.why,
        alike=len({c.why for c in choices}) == 1,
    )


def _ends(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)


# ---- what the recipe wrote


def _ruled(
    found: Bundle, table: dict[str, dict[str, list[layer_table.Row]]], variants: Sequence[str]
) -> Iterator[Ruled]:
    for name in (v for v in variants if v in table):
        variant = found.variants[name]
        for graph, rows in table[name].items():
            alike: dict[tuple[str, str, str], list[str]] = {}
            plain = _plain(found, table, graph)
            for row in rows:
                why = _why(row, variant, graph, plain)
                alike.setdefault((row["op"], row["precision"], why), []).append(row["name"])
            for (op, precision, why), names in alike.items():
                yield Ruled(name, graph, op, precision, why, tuple(names))


def _plain(found: Bundle, table: dict[str, dict[str, list[layer_table.Row]]], graph: str) -> frozenset[str]:
    """Names of the layers of a variant that nothing was put into; empty where the bundle has none."""
    floats = [v.name for v in found.variants.values() if not v.quantized and v.name in table]
    return frozenset(row["name"] for row in table[floats[0]].get(graph, ())) if floats else frozenset()


def _why(row: layer_table.Row, variant: Variant, graph: str, plain: frozenset[str]) -> str:
    """Which rule gave a layer its precision. plain: the layers that the model itself has, if known."""
    if variant.on(graph) is not variant:
        return f"graphs: the variant is for {', '.join(variant.graphs)} alone"
    name, precision = row["name"], row["precision"]
    keep = next((pattern for pattern in variant.keep if kept(name, (pattern,))), None)
    if row["op"] in _PRODUCTS and variant.quantized:
        return _why_product(name, " x " in precision, variant, keep)
    if plain and name not in plain and variant.quantized:
        return "put in by quantization: it works out or applies scales"
    if precision != variant.float_dtype.value:
        return f"keep: {keep}" if keep else "an operator that always stays in float32, or feeds one"
    computed = variant.compute.get("float", precision)
    return f"the variant's float: {precision}" + (f", computed in {computed}" if computed != precision else "")


def _why_product(name: str, quantized: bool, variant: Variant, keep: str | None) -> str:
    """Of a product in a variant that quantizes some. quantized: whether it is one of them."""
    rule = next((r for r in variant.layers if kept(name, (r.pattern,))), None)
    if keep and not quantized:
        return f"keep: {keep}"
    if rule and (quantized or rule.weights is None):
        return f"layers: {rule.pattern}: {_form(rule)}"
    if quantized:
        return f"the variant's own format: {_form(variant)}"
    if variant.weights is Precision.STORED:
        return "weights: stored: the checkpoint has it in float, or it is a product of two activations"
    if variant.weights is None:
        return "no rule of layers names it"
    return "a product of two activations: it has no weights to quantize"


def _form(form: Variant | LayerRule) -> str:
    if form.weights is None:
        return "in float"
    parts = [f"weights {form.weights.value}"]
    if form.block_size:
        parts.append(f"in blocks of {form.block_size}")
    if form.activations is not None:
        parts.append(f"activations {form.activations.value}{', scales at run time' if form.dynamic else ''}")
    return ", ".join(parts)
