"""medcompile verify: a bundle's digests, and its evidence made again on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medcompile.commands.inspect import artifact_facts
from medcompile.commands.options import AllowPhi, AsJson, BundlePath, Threads
from medcompile.errors import MedcompileError, UsageError

if TYPE_CHECKING:
    from medcompile.bundle import Bundle
    from medcompile.data import Dataset


def verify(
    bundle_path: BundlePath,
    data: Annotated[
        Path | None, typer.Option(help="Manifest of the evaluation data; default: calibration/NAME.yaml here.")
    ] = None,
    digests_only: Annotated[bool, typer.Option(help="Check the files alone, and run nothing.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Instead, say where the graphs of a variant leave those of fp32.")
    ] = False,
    variant: Annotated[str | None, typer.Option(help="With --layers: which variant; default: each.")] = None,
    allow_phi: AllowPhi = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Check every digest, then make the accuracy evidence again on this machine.

    An engine that was built without its device and runs here for the first time gets its own evidence into the bundle.
    """
    from medcompile import bundle, terminal

    found = bundle.read(bundle_path)
    told = terminal.console(stderr=True)
    told.print(f"{len(found.files)} files have the digests of the manifest")
    if digests_only:
        if as_json:
            typer.echo(json.dumps({"digest": found.digest, "files": len(found.files)}))
        return
    from medcompile import verify as verification

    if variant is not None and not layers:
        raise UsageError("--variant goes with --layers", fix="leave it out: every variant is verified")
    judged_on = verification.evaluation(found, data, allow_phi=allow_phi)
    if layers:
        _tell_layers(found, judged_on, variant, as_json)
        return
    repeated = verification.repeat(found, judged_on, threads)
    made = [r.artifact for r in repeated if r.made]
    if not as_json:
        told.print(terminal.evidence_table(made, f"{found.name}, on this machine"))
    for r in repeated:
        what = f"{r.artifact.variant} for {r.artifact.target.name}, {r.artifact.graph}"
        if r.reason:
            told.print(f"{what}: did not run here: {r.reason}", markup=False, soft_wrap=True)
        if r.renewed:
            told.print(f"{what}: {r.artifact.verified_on}, for the first time", markup=False, soft_wrap=True)
    if any(r.renewed for r in repeated):
        verification.renew(found, repeated)
        told.print(f"{found.root} now holds that evidence", markup=False, soft_wrap=True)
    if as_json:
        rows = (
            {"reason": r.reason, "made": r.made, "renewed": r.renewed} | artifact_facts(r.artifact) for r in repeated
        )
        typer.echo(json.dumps(list(rows), indent=1))
    worse = [r.artifact for r in repeated if r.made and r.recorded not in (None, r.artifact.verdict)]
    if not made or worse:
        names = ", ".join(f"{a.variant} on {a.target.name}: {a.verdict}" for a in worse) or "nothing could be run"
        raise MedcompileError(
            f"the evidence of {found.name} does not hold on this machine ({names})",
            fix="rebuild the bundle on this machine, or use an artifact whose verdict holds",
        )


def _tell_layers(found: Bundle, judged_on: Dataset, variant: str | None, as_json: bool) -> None:
    """Print the layer errors of one variant, or each, and the first layer that jumps."""
    from medcompile import terminal
    from medcompile.layer_errors import fp32_of, layer_errors

    exact = fp32_of(found).name
    rows: list[dict[str, Any]] = []
    for name in [variant] if variant else [v for v in found.variants if v != exact]:
        for graph in found.graphs:
            errors = layer_errors(found, name, graph, judged_on)
            first = next((e.node for e in errors if e.jumped), None)
            rows.append(
                {"variant": name, "graph": graph, "first_jump": first, "layers": [asdict(error) for error in errors]}
            )
            if not as_json:
                terminal.console().print(terminal.layer_error_table(errors, f"{name} beside {exact}: {graph}"))
                told = f"{name}, {graph}: the error first jumps at {first}" if first else f"{name}, {graph}: no jump"
                typer.echo(told)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
