"""medcompile report: the evidence report of a bundle, rendered again from its files. Runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medcompile.commands.options import AsJson, BundlePath
from medcompile.errors import UsageError


def report(
    bundle_path: BundlePath,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to write it; default NAME-report.html here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a bundle's evidence report again: one HTML page that a reviewer can read offline."""
    from medcompile import bundle
    from medcompile import report as reports

    found = bundle.read(bundle_path)
    texts = reports.texts(found, found.root)
    if as_json:
        typer.echo(texts[bundle.EVIDENCE], nl=False)
        return
    place = out or Path(f"{found.name}-report.html")
    if place.resolve().is_relative_to(found.root):
        raise UsageError(
            f"{place} is inside of the bundle, which holds no file that its manifest does not list",
            fix=f"name another place with -o; the page that the build wrote is {found.root / reports.REPORT}",
        )
    try:
        place.write_text(texts[reports.REPORT], encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{place}: {error.strerror or error}", fix="name a file that can be written, with -o"
        ) from error
    typer.echo(place)
