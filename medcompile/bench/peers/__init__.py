"""The contenders, one file each: the file name is the registry key, and the module's PEER is the instance.

A file imports nothing heavy at its top: every file is imported to list what there is, also in interpreters that hold
another contender's libraries and not ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from medcompile.bench.peer import Peer
from medcompile.errors import UsageError


def names() -> tuple[str, ...]:
    """Every contender file there is, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Peer:
    """The contender of that file name, or of a Python file by its path. Raises UsageError naming those there are."""
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in names():
        raise UsageError(
            f"no contender {name!r}", fix=f"choose from: {', '.join(names())}; or give the path of a .py file"
        )
    peer: Peer = importlib.import_module(f"{__name__}.{name}").PEER
    assert peer.name == name, f"peers/{name}.py calls itself {peer.name}"
    return peer


def _from_file(path: Path) -> Peer:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path}: no such Python file", fix="give the path of a file that has a PEER")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer = getattr(module, "PEER", None)
    if not isinstance(peer, Peer):
        raise UsageError(f"{path} has no PEER", fix="make one: an instance of a class of medcompile.bench.peer.Peer")
    return peer
