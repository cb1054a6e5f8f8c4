"""medcompile explain: why each layer got its precision, and what it would cost to change it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from medcompile.commands.options import AsJson, BundlePath

if TYPE_CHECKING:
    from rich.table import Table

    from medcompile.explain import Explanation, Ruled
    from medcompile.search.record import Search

SCHEMA_VERSION = 1
_NAMED = 8


def explain(
    bundle_path: BundlePath,
    layer: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only these layers, each by itself: 'encoder.layer.0.*'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say why each layer has its precision, and what another one would cost.

    Of a bundle that a search made: what was tried, what the tests said, and every choice with its alternatives. Of
    variants that a recipe wrote out: which rule holds for which layer.
    """
    from medcompile import bundle, manifest, terminal
    from medcompile.explain import explain as explained

    found = bundle.read(bundle_path)
    told = explained(found, layer)
    if as_json:
        plain = {"schema_version": SCHEMA_VERSION, "name": found.name, "digest": found.digest}
        typer.echo(json.dumps(plain | manifest.encode(told), indent=1))
        return
    console = terminal.console()
    for search in told.searches:
        for table in _search_tables(search, unfolded=layer is not None):
            console.print(table)
        for note in search.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    for table in _rule_tables(told, unfolded=layer is not None):
        console.print(table)
    for note in told.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if layer is None:
        console.print("--layer 'encoder.layer.0.*' shows layers one by one", markup=False)


# ---- searches


def _search_tables(search: Search, unfolded: bool) -> Iterator[Table]:
    from medcompile import terminal

    searched = f"{search.objective}, {search.basis}; {len(search.points)} points, {search.seconds:.0f} s"
    looks = f"{len(search.looks)} of {search.most_looks} that were allowed"
    found = f"{search.chosen}, as variant {search.variant}" if search.chosen else "none was confirmed"
    yield terminal.facts([("target", search.target), ("searched for", searched), ("looks", looks), ("found", found)])
    if not unfolded:
        yield from _history(search)
    yield from _choices(search, unfolded)


def _history(search: Search) -> Iterator[Table]:
    """What was tried, and what was looked at on the acceptance data."""
    rows = [
        (
            p.name + (" (found)" if p.name == search.chosen else ""),
            ", ".join(f"{n} {f}" for f, n in p.formats.items()),
            _amount(p.cost, search.objective) or f"{_amount(p.predicted, search.objective)} predicted".strip(),
            f"{p.size_bytes / 1e6:.2f}",
            "" if p.error is None else f"{p.error:.3%}",
            {True: "passed", False: "failed", None: "not asked"}[p.passed],
            p.why,
        )
        for p in search.points
    ]
    yield from _table("what was tried", "point|groups of layers|>cost|>MB|>error|tuning data|what came of it", rows)
    looks = [
        (
            str(look.number),
            look.point,
            e.graph,
            e.metric,
            f"{e.difference:+.4f}",
            f"{e.lower:+.4f}",
            "" if e.margin is None else f"{e.margin:g}",
            f"{e.confidence:.4g}",
            str(e.verdict),
            "accepted" if look.accepted else "rejected",
        )
        for look in search.looks
        for e in look.evidence
        if e.verdict is not None
    ]
    head = "look|point|graph|metric|>difference|>lower bound|>margin|>confidence|verdict|point is"
    yield from _table("looks at the acceptance data", head, looks)


def _choices(search: Search, unfolded: bool) -> Iterator[Table]:
    """Error and cost of every alternative; the cost is of changing that one group alone."""
    from medcompile.explain import folded

    several = len({c.graph for c in search.layers}) > 1
    made = [f for choice in search.layers for f in folded([choice])] if unfolded else folded(search.layers)
    rows = []
    for one in made:
        options = [
            f"{o.format}: error {_share(o.error)}, cost {_more(o.cost, search.objective)}" for o in one.alternatives
        ]
        layers = "\n".join(name.removesuffix("/MatMul") for name in one.layers)
        layers += f"\n({one.groups} groups of layers)" if one.groups > 1 else ""
        why = one.why if one.alike else f"for example: {one.why}"
        graph = [one.graph] if several else []
        rows.append((*graph, layers, one.format, _share(one.error), why, "\n".join(options) or "none"))
    head = ("graph|" if several else "") + "layers|format|>error alone|why|instead, for each group alone"
    yield from _table("formats by layer", head, rows)


def _share(ends: tuple[float, float]) -> str:
    low, high = (f"{end:.3%}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _more(ends: tuple[float, float], objective: str) -> str:
    low, high = (_amount(end, objective, sign="+") for end in ends)
    return low if low == high else f"{low} to {high}"


def _amount(cost: float | None, objective: str, sign: str = "") -> str:
    """A cost in the objective's unit."""
    from medcompile.search.record import UNITS

    if cost is None:
        return ""
    unit = UNITS[objective]
    return f"{cost / 1e6:{sign}.3f} MB" if unit == "bytes" else f"{cost:{sign}.3f} {unit}"


# ---- rules


def _rule_tables(told: Explanation, unfolded: bool) -> Iterator[Table]:
    title = "precision by layer, as the recipe has it"
    if unfolded:
        rows = [(r.variant, r.graph, r.op, r.precision, r.why, name) for r in told.rules for name in r.layers]
        yield from _table(title, "variant|graph|operator|precision|by which rule|layer", rows)
        return
    alike: dict[tuple[str, ...], list[Ruled]] = {}
    for rule in told.rules:
        alike.setdefault((rule.variant, rule.graph, rule.precision, rule.why), []).append(rule)
    yield from _table(
        title, "variant|graph|precision|by which rule|layers", [(*key, _layers(rules)) for key, rules in alike.items()]
    )


def _layers(rules: Sequence[Ruled]) -> str:
    """How many of which operator; of products, the names of the layers as well."""
    from medcompile import layer_table

    counts = ", ".join(f"{len(r.layers)} {r.op}" for r in rules)
    if len(rules) > 1 or "MatMul" not in rules[0].op:
        return counts
    names = layer_table.groups(name.removesuffix("/MatMul") for name in rules[0].layers)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{counts}: {', '.join(names[:_NAMED])}{more}"


def _table(title: str, head: str, rows: Sequence[Sequence[str]]) -> Iterator[Table]:
    """A table as terminal.table has it, unless there are no rows."""
    from medcompile import terminal

    if rows:
        yield terminal.table(title, head, rows)
