"""medcompile inspect: what a bundle holds, without running it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medcompile.commands.options import AsJson, BundlePath, Verbose
from medcompile.errors import UsageError

if TYPE_CHECKING:
    from medcompile.bundle import Bundle


def inspect(
    bundle_path: BundlePath,
    engine: Annotated[
        bool,
        typer.Option("--engine", help="Show its engines instead: profiles, tensors, every layer with its formats."),
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show a bundle: graphs, variants, sizes, and which operators run in which precision."""
    from medcompile import bundle, terminal
    from medcompile.verify import DID_NOT_RUN

    found = bundle.read(bundle_path)
    if engine:
        _tell_engines(found, as_json)
        return
    layers = json.loads((found.root / "layers.json").read_bytes()) if "layers.json" in found.files else {}
    if as_json:
        typer.echo(json.dumps(summary(found) | {"layers": layers}, indent=1))
        return
    console = terminal.console()
    source = found.provenance.get("source", "")
    console.print(
        terminal.facts(
            [
                ("bundle", f"{found.name} ({found.root})"),
                ("digest", found.digest),
                ("family", f"{found.family}: {', '.join(found.tasks)}"),
                ("source", f"{source} {found.provenance.get('revision', '')}"),
                *((f"graph {g.name}", _face(found, g.name)) for g in found.graphs.values()),
            ]
        )
    )
    console.print(terminal.size_table(found))
    console.print(terminal.layer_table(layers))
    console.print(terminal.evidence_table(found.artifacts, "evidence", judged_only=not verbose))
    for artifact in found.artifacts:
        if not artifact.ran:
            what = f"{artifact.variant} for {artifact.target.name}, {artifact.graph}: {artifact.verified_on}"
            reason = next((n for n in artifact.notes if n.startswith(DID_NOT_RUN)), "it was not judged")
            console.print(f"note: {what}; {reason}", markup=False, soft_wrap=True)
    for note in found.provenance.get("notes", ()):
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for artifact in found.artifacts if verbose else ():
        built = f"{artifact.variant} for {artifact.target.name}, {artifact.graph}: {'; '.join(artifact.notes)}"
        console.print(built, markup=False, soft_wrap=True)


def _tell_engines(found: Bundle, as_json: bool) -> None:
    """Print what backends left beside their engines. Raises UsageError if none did."""
    from medcompile import terminal

    told = [(a, f"{found.folder_of(a)}/layers.json") for a in found.artifacts]
    engines = [(a, json.loads((found.root / path).read_bytes())) for a, path in told if path in found.files]
    if not engines:
        there = ", ".join(sorted({a.target.name for a in found.artifacts}))
        raise UsageError(
            f"{found.name} holds no engine with a layer table; it is built for {there}",
            fix=f"medcompile build --from {found.root} --targets tensorrt-rtx",
        )
    if as_json:
        rows = ({"variant": a.variant, "target": a.target.name, "graph": a.graph} | engine for a, engine in engines)
        typer.echo(json.dumps(list(rows), indent=1))
        return
    for a, engine in engines:
        title = f"{a.variant} for {a.target.name}, {a.graph}: runs on {a.target.device} {a.target.arch}"
        for table in terminal.engine_tables(engine, title):
            terminal.console().print(table)


def _face(found: Bundle, graph: str) -> str:
    spec = found.graphs[graph]
    sides = [", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in side) for side in (spec.inputs, spec.outputs)]
    ranges = ", ".join(f"{a.name} {a.min}..{a.max} (opt {a.opt})" for p in spec.profiles for a in p.axes)
    return f"{sides[0]} -> {sides[1]}; {ranges}".replace("'", "")


def summary(found: Bundle) -> dict[str, Any]:
    return {
        "name": found.name,
        "root": str(found.root),
        "digest": found.digest,
        "family": found.family,
        "tasks": list(found.tasks),
        "graphs": {name: asdict(spec) for name, spec in found.graphs.items()},
        "variants": {name: asdict(variant) for name, variant in found.variants.items()},
        "artifacts": [artifact_facts(a) for a in found.artifacts],
        "provenance": dict(found.provenance),
    }


def artifact_facts(artifact: Any) -> dict[str, Any]:
    return asdict(artifact) | {"verdict": artifact.verdict}
