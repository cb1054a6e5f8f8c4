"""Options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON for machines to stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more on stderr.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, such as engines/quickstart.")]
Threads = Annotated[int | None, typer.Option(help="Threads to run on; default: every core.")]
AllowPhi = Annotated[bool, typer.Option(help="Read data whose manifest says phi: present, in this run.")]


def named_bundle(told: str) -> tuple[str, Path]:
    """name=folder, or a folder alone, whose bundle goes by its own name: "" then."""
    name, equals, path = told.partition("=")
    return (name, Path(path)) if equals and "/" not in name and not Path(told).exists() else ("", Path(told))
