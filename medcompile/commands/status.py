"""medcompile status: how a running server fares, in one line."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated

import typer

from medcompile.errors import BackendUnavailable, MedcompileError

if TYPE_CHECKING:
    from medcompile.serve.status import Look


def status(
    url: Annotated[str, typer.Argument(help="Of the server.")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(envvar="MEDCOMPILE_KEY", help="With the role metrics, if the server asks.")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="Between two looks, of which rates are told.")] = 2.0,
    watch: Annotated[bool, typer.Option("--watch", help="A line after each look, until interrupted.")] = False,
) -> None:
    """Say how a running server fares: models, requests, tokens, times to the first token."""
    try:
        from medcompile.serve.status import line
    except ImportError as error:
        raise BackendUnavailable(f"status needs {error.name}", fix='pip install "medcompile[serve]"') from None

    before = _look(url, key)
    while True:
        time.sleep(seconds)
        now = _look(url, key)
        typer.echo(line(now, before))
        if not watch:
            return
        before = now


def _look(url: str, key: str) -> Look:
    from medcompile.serve.status import Look

    request = urllib.request.Request(f"{url.rstrip('/')}/metrics")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return Look.parsed(response.read().decode())
    except urllib.error.HTTPError as error:
        raise MedcompileError(f"{url} answers {error.code}", fix="give a key with the role metrics: --key") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise MedcompileError(f"{url}: {error}", fix="give the URL that medcompile serve told when it began") from None
