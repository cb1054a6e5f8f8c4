"""The command line as a user meets it: in this process for speed, or in one of its own where that matters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from medcompile.cli import app

ROOT = Path(__file__).resolve().parent.parent
MAIN = "from medcompile.cli import main; main()"


def call(*args: object, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process. .stdout, .stderr and .exit_code say what came of it; a crash is raised here."""
    result: Result = CliRunner().invoke(app, [str(a) for a in args], input=stdin, prog_name="medcompile")  # type: ignore[assignment]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def start(*args: object, before: str = "", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in its own process. before: Python that runs ahead of it."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{MAIN}", *(str(a) for a in args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )


def spawn(
    *args: object, before: str = "", env: Mapping[str, str] | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process to its end."""
    process = start(*args, before=before, env=env)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
