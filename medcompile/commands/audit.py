"""medcompile audit: check the log of a server, and tell its head."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcompile.commands.options import AsJson

if TYPE_CHECKING:
    from medcompile.serve.chain import Verdict

audit = typer.Typer(no_args_is_help=True, help="Check the audit log of a server.")

Log = Annotated[Path, typer.Argument(metavar="LOG", exists=True, help="The log's folder, or one file of it.")]
KeyFile = Annotated[Path | None, typer.Option("--key-file", metavar="PATH", help="The log's key, where it has one.")]


@audit.command()
def verify(
    log: Log,
    key_file: KeyFile = None,
    head: Annotated[
        str, typer.Option(metavar="HASH", help="A hash noted earlier: finds an end that was cut off.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Check that no line was altered, taken out, put in or moved, and say where if one was. Exits 1 then."""
    from medcompile.serve.chain import read_key
    from medcompile.serve.chain import verify as verified

    verdict = verified(log, key=None if key_file is None else read_key(key_file), head=head)
    if as_json:
        typer.echo(json.dumps(asdict(verdict), indent=1))
    else:
        _tell(log, verdict, sought=bool(head))
    if not verdict.whole:
        raise typer.Exit(1)


def _tell(log: Path, verdict: Verdict, *, sought: bool) -> None:
    from medcompile import terminal
    from medcompile.serve.chain import ZERO

    facts = [("records", f"{verdict.records}, {verdict.first} to {verdict.last}")]
    if verdict.whole:
        facts.append(("chain", "whole" + (", and the given head is in it" if sought else "")))
    else:
        where = f"{verdict.file}:{verdict.line}" if verdict.line else verdict.file
        facts.append(("chain", f"BROKEN at {where}: {verdict.problem}"))
        facts.append(("good until", f"record {verdict.last}" if verdict.records else "no record"))
    facts.append(("head", verdict.head))
    if verdict.before != ZERO:
        facts.append(("goes on from", f"{verdict.before} (older files are not here)"))
    if verdict.whole and not sought:
        facts.append(("not shown", "that its end was not cut off: give --head HASH, noted elsewhere earlier"))
    if verdict.whole and not verdict.keyed:
        facts.append(("not shown", "that it was not written anew as a whole: this log has no key"))
    console = terminal.console()
    console.print(str(log), markup=False, highlight=False)
    console.print(terminal.facts(facts))
