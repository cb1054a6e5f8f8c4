"""The command line. Every heavy import is inside its command, so that --help costs what typer costs. The longer
commands are in commands/, one file each.

Data goes to stdout (--json for machines), everything else to stderr. Exit codes: 0 good, 1 failed, 2 wrong usage or
recipe, 3 built but over budget.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medcompile import __version__
from medcompile.commands.audit import audit
from medcompile.commands.batch import batch
from medcompile.commands.bench import bench
from medcompile.commands.build import build
from medcompile.commands.diff import diff
from medcompile.commands.explain import explain
from medcompile.commands.inspect import inspect
from medcompile.commands.keys import keys
from medcompile.commands.options import AsJson
from medcompile.commands.report import report
from medcompile.commands.run import run
from medcompile.commands.serve import serve
from medcompile.commands.status import status
from medcompile.commands.verify import verify
from medcompile.errors import MedcompileError


class _Group(TyperGroup):
    """Turns this project's errors into a message on stderr and their exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MedcompileError as error:
            name = type(error).__name__
            text = str(error) if name == "RecipeError" else f"{name}: {error}"
            sys.stderr.write(f"{text}\n")
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError:
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A compiler for medical models: quantized, typed ONNX and engines, with the evidence that accuracy held.",
)


def main() -> None:
    signal.signal(signal.SIGTERM, _ended)
    app()


def _ended(number: int, frame: object) -> None:
    """Leave as by an exception, so that nothing half-written stays. `serve` has a handler of its own while it runs."""
    raise SystemExit(128 + number)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


# In the order of --help.
app.command()(build)
app.command()(inspect)
app.command()(verify)
app.command()(run)
app.command()(report)
app.command()(diff)
app.command()(explain)
app.command()(bench)
app.add_typer(keys, name="keys")
app.add_typer(audit, name="audit")
app.command()(serve)
app.command()(status)
app.command()(batch)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can build and run, and the exact fix for what it can't."""
    from rich.text import Text

    from medcompile import terminal
    from medcompile.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in findings], indent=1))
        return
    marks = {True: ("yes ", "green"), False: ("no  ", "yellow")}
    terminal.console().print(
        terminal.facts((f.what, Text.assemble(marks[f.good], f.told())) for f in findings), soft_wrap=False
    )


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for completion in editors."""
    from medcompile.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
