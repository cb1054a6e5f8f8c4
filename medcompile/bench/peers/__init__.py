"""The contenders, one file each: the file name is the registry key, and the module's PEER is the instance.

A file imports nothing heavy at its top: every file is imported to list what there is, also in interpreters that hold
another contender's libraries and not ours.
"""

from __future__ import annotations

import importlib
import pkgutil

from medcompile.bench.peer import Peer
from medcompile.errors import UsageError


def names() -> tuple[str, ...]:
    """Every contender file there is, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Peer:
    """The contender of that file name. Raises UsageError naming those there are."""
    if name not in names():
        raise UsageError(f"no contender {name!r}", fix=f"choose from: {', '.join(names())}")
    peer: Peer = importlib.import_module(f"{__name__}.{name}").PEER
    assert peer.name == name, f"peers/{name}.py calls itself {peer.name}"
    return peer
