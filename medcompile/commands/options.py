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
