"""medcompile keys: make, list and end the keys that a server asks for. A key is shown once, when it is made."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcompile.commands.options import AsJson
from medcompile.errors import UsageError

if TYPE_CHECKING:
    from medcompile.serve.keys import Key

keys = typer.Typer(no_args_is_help=True, help="Make, list and end the keys that a server asks for.")

KeyFile = Annotated[Path, typer.Option("--file", "-f", metavar="PATH", help="The key file; a server reads it anew.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Who uses it, such as ward-3; stands in logs.")]
Expires = Annotated[str, typer.Option(metavar="TIME", help="When it ends, counted from now: 90d, 12h; or never.")]

_UNITS: Mapping[str, int] = {"m": 60, "h": 3600, "d": 86_400}


@keys.command()
def add(
    name: Name,
    file: KeyFile,
    role: Annotated[list[str] | None, typer.Option(help="inference, metrics or admin; may be repeated.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="N", help="Requests a minute; default: no limit.")] = None,
    burst: Annotated[int | None, typer.Option(metavar="N", help="Requests at once after a pause.")] = None,
    expires: Expires = "never",
) -> None:
    """Make a key. It goes to stdout, this once; the file holds its SHA-256 alone."""
    from medcompile.serve.keys import INFERENCE, Key, digest, edited, new_key
    from medcompile.serve.rates import Rate

    if burst is not None and rate is None:
        raise UsageError("--burst without --rate", fix="give both, or neither")
    fresh, now = new_key(), int(time.time())
    made = Key(
        name,
        tuple(dict.fromkeys(role or [INFERENCE])),
        digest(fresh),
        now,
        _end(expires, now),
        None if rate is None else Rate(rate, burst),
    )
    with edited(file) as held:
        if any(key.name == name for key in held):
            raise UsageError(f"{file} has a key named {name}", fix=f"medcompile keys rotate {name}, or another name")
        held.append(made)
    _show(fresh, made)


@keys.command("list")
def list_(file: KeyFile, as_json: AsJson = False) -> None:
    """List the keys: who, which roles, until when. The keys themselves are known to their users alone."""
    from rich.table import Table

    from medcompile import terminal
    from medcompile.serve.keys import read, told

    held, now = read(file), time.time()
    if as_json:
        typer.echo(json.dumps([_plain(key) for key in held], indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "id", "roles", "requests a minute", "made", "ends"):
        table.add_column(column)
    for key in held:
        ends = "never" if key.expires is None else told(key.expires) + ("" if key.holds(now) else " (over)")
        rate = "-" if key.rate is None else f"{key.rate.per_minute:g}, {key.rate.burst} at once"
        table.add_row(key.name, key.id, ", ".join(key.roles), rate, told(key.created), ends)
    terminal.console().print(table)


@keys.command()
def remove(name: Name, file: KeyFile) -> None:
    """End every key of this name. A running server refuses them a second later."""
    from medcompile.serve.keys import edited

    with edited(file) as held:
        if not _named(held, name):
            raise UsageError(f"{file} has no key named {name}", fix="medcompile keys list shows those that there are")
        held[:] = [key for key in held if key.name != name]


@keys.command()
def rotate(
    name: Name,
    file: KeyFile,
    keep: Annotated[str, typer.Option(metavar="TIME", help="How long the old key is still good: 1h, 7d.")] = "0m",
    expires: Expires = "never",
) -> None:
    """Make a new key with the name, roles and rate of an old one, and let the old one end."""
    from medcompile.serve.keys import digest, edited, new_key

    fresh, now = new_key(), int(time.time())
    with edited(file) as held:
        old = _named(held, name)
        if not old:
            raise UsageError(f"{file} has no key named {name}", fix=f"medcompile keys add {name}")
        until = now + _span(keep)
        made = replace(old[-1], sha256=digest(fresh), created=now, expires=_end(expires, now))
        ending = [
            key if key.expires is not None and key.expires < until else replace(key, expires=until) for key in old
        ]
        held[:] = [key for key in held if key.name != name] + [key for key in ending if key.holds(now)] + [made]
    _show(fresh, made)


def _named(held: list[Key], name: str) -> list[Key]:
    return [key for key in held if key.name == name]


def _show(fresh: str, made: Key) -> None:
    typer.echo(fresh)
    typer.echo(f"key {made.id} of {made.name}: shown this once; put it where {made.name} keeps secrets", err=True)


def _plain(key: Key) -> dict[str, object]:
    from medcompile.serve.keys import told

    return {
        "name": key.name,
        "id": key.id,
        "roles": list(key.roles),
        "requests_per_minute": key.rate.per_minute if key.rate else None,
        "burst": key.rate.burst if key.rate else None,
        "created": told(key.created),
        "expires": None if key.expires is None else told(key.expires),
    }


def _end(expires: str, now: int) -> int | None:
    return None if expires == "never" else now + _span(expires)


def _span(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if not found:
        raise UsageError(f"{text!r} is not a span of time", fix="write for example 90d, 12h or 30m")
    return int(found[1]) * _UNITS[found[2]]
