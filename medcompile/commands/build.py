"""medcompile build: a recipe into a bundle, or a bundle's graphs for more targets."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Annotated

import typer

from medcompile.commands.inspect import summary
from medcompile.commands.options import AllowPhi, AsJson, Verbose
from medcompile.errors import MedcompileError, UsageError


def build(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe, such as recipes/quickstart.yaml.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle's folder; default engines/NAME, with --from that bundle itself."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="BUNDLE", help="Build a bundle's graphs for more targets.")
    ] = None,
    targets: Annotated[str | None, typer.Option(help="With --from: the targets, with commas between them.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --from: manifest of the evaluation data; default: calibration/NAME.yaml.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the recipe.")
    ] = None,
    offline: Annotated[bool, typer.Option(help="Fetch nothing; use what is already here.")] = False,
    allow_phi: AllowPhi = False,
    cache: Annotated[Path | None, typer.Option(help="The cache folder; default $MEDCOMPILE_CACHE.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compile a recipe into a bundle and show the evidence. With --from, build a bundle's graphs for more targets."""
    from medcompile import bundle, terminal
    from medcompile.errors import OverBudgetError

    _check_origin(recipe, source, recipe_only={"--set": settings}, source_only={"--targets": targets, "--data": data})
    failure: OverBudgetError | None = None
    try:
        with terminal.progress(as_json, verbose) as progress:
            if recipe is not None:
                from medcompile import pipeline

                built = pipeline.build(
                    recipe,
                    out=out,
                    overrides=settings or (),
                    offline=offline,
                    allow_phi=allow_phi,
                    cache_folder=cache,
                    progress=progress,
                )
            else:
                from medcompile.relower import relower

                assert source is not None
                wanted = (targets or "").replace(",", " ").split()
                built = relower(
                    source, wanted, out=out, data=data, allow_phi=allow_phi, cache_folder=cache, progress=progress
                )
    except OverBudgetError as error:
        failure = error
        built = bundle.read(error.bundle, check=False)
    except MedcompileError:
        if verbose:
            traceback.print_exc()
        raise
    if as_json:
        typer.echo(json.dumps(summary(built), indent=1))
    else:
        table = terminal.evidence_table(built.artifacts, f"{built.name}: {built.root}", judged_only=True)
        terminal.console(stderr=True).print(table)
        typer.echo(built.root)
    if failure is not None:
        raise failure


def _check_origin(
    recipe: Path | None, source: Path | None, recipe_only: dict[str, object], source_only: dict[str, object]
) -> None:
    """Raise UsageError unless there is a recipe or --from, one of them, and only options that go with it."""
    if (recipe is None) == (source is None):
        raise UsageError(
            "give a RECIPE, or --from BUNDLE" + ("" if recipe is None else ": not both"),
            fix="medcompile build recipes/NAME.yaml, or medcompile build --from engines/NAME --targets TARGET",
        )
    foreign = source_only if recipe is not None else recipe_only
    if wrong := [name for name, value in foreign.items() if value]:
        raise UsageError(
            f"{', '.join(wrong)} {'needs --from BUNDLE' if recipe is not None else 'needs a recipe'}",
            fix="targets and data of a recipe stand in it; change one with --set, for example --set targets=[...]"
            if recipe is not None
            else "the bundle's variants stay as they are; to change them, build the recipe again",
        )
