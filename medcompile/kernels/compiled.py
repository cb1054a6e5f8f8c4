"""Attention kernels as PTX, with what it takes to launch them: what a bundle and an engine carry.

On disk that is a folder of paged_attention.json and one .ptx per kind of GPU, inside an engine one packed string of
bytes; equal kernels give equal bytes. ptx.py makes them; neither Triton nor a device is known here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcompile.errors import BackendError, BackendUnavailable
from medcompile.kernels.launches import Face

INDEX = "paged_attention.json"
_FORMAT = 1
_REBUILD = "build the bundle again: medcompile build --from BUNDLE --targets TARGET"


@dataclass(frozen=True)
class Entry:
    """One kernel of a module. name: in the PTX. shared_bytes: of dynamic shared memory that a launch must ask for.

    arguments: (name, kind) in order, kind being pointer, int32 or float32. scratch: null pointers that follow them,
    for memory of Triton's own, of which these kernels need none.
    """

    name: str
    warps: int
    shared_bytes: int
    arguments: tuple[tuple[str, str], ...]
    scratch: int


@dataclass(frozen=True)
class Module:
    """PTX for one kind of GPU and the kernels in it."""

    ptx: str
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Kernels:
    """One model's attention kernels. compiler: what made them. modules: by architecture, as sm_80 or sm_90a.

    A module runs on its compute capability and all later ones; one with an "a" on no other than its own.
    """

    face: Face
    compiler: str
    modules: Mapping[str, Module]

    def module_for(self, compute_capability: tuple[int, int]) -> Module:
        """The one that suits a GPU best. Raises BackendUnavailable if none does."""
        here = 10 * compute_capability[0] + compute_capability[1]
        if (own := self.modules.get(f"sm_{here}a")) is not None:
            return own
        older = [n for n in (int(arch[3:]) for arch in self.modules if arch[-1] != "a") if n <= here]
        if not older:
            raise BackendUnavailable(
                f"the attention kernels are compiled for {', '.join(self.modules)}, and this GPU is sm_{here}",
                fix="run on a GPU of compute capability 8.0 or later",
            )
        return self.modules[f"sm_{max(older)}"]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.pack()).hexdigest()

    def pack(self) -> bytes:
        """Everything as bytes, small enough for every layer of an engine to hold them."""
        return zlib.compress(_json(self._table() | {"ptx": {arch: m.ptx for arch, m in self.modules.items()}}), 9)

    @classmethod
    def unpack(cls, data: bytes) -> Kernels:
        """Raises BackendError for bytes that pack() did not make."""
        try:
            table = json.loads(zlib.decompress(data))
            return cls._of(table, table["ptx"])
        except (zlib.error, ValueError, KeyError, TypeError) as error:
            raise BackendError(f"its attention kernels cannot be read: {error}", fix=_REBUILD) from error

    def save(self, folder: Path) -> None:
        """Write them as files into an existing folder."""
        for arch, module in self.modules.items():
            (folder / f"{arch}.ptx").write_text(module.ptx, encoding="ascii")
        (folder / INDEX).write_bytes(_json(self._table()))

    @classmethod
    def read(cls, folder: Path) -> Kernels:
        """What save() wrote. Raises BackendError where that is not complete, or not what it was."""
        try:
            table = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            texts = {arch: (folder / f"{arch}.ptx").read_text(encoding="ascii") for arch in table["modules"]}
            return cls._of(table, texts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackendError(f"{folder.name} does not hold attention kernels: {error}", fix=_REBUILD) from error

    def _table(self) -> dict[str, Any]:
        modules = {
            arch: {"sha256": _sha256(m.ptx), "entries": {k: dataclasses.asdict(e) for k, e in m.entries.items()}}
            for arch, m in sorted(self.modules.items())
        }
        return {
            "format": _FORMAT,
            "compiler": self.compiler,
            "face": dataclasses.asdict(self.face),
            "modules": modules,
        }

    @classmethod
    def _of(cls, table: Mapping[str, Any], texts: Mapping[str, str]) -> Kernels:
        if table["format"] != _FORMAT:
            raise ValueError(f"they are of format {table['format']}, and this medcompile reads {_FORMAT}")
        modules = {}
        for arch, module in table["modules"].items():
            if _sha256(texts[arch]) != module["sha256"]:
                raise ValueError(f"{arch}.ptx was changed")
            entries = {
                kernel: Entry(**{**entry, "arguments": tuple((name, kind) for name, kind in entry["arguments"])})
                for kernel, entry in module["entries"].items()
            }
            modules[arch] = Module(texts[arch], entries)
        return cls(Face(**table["face"]), table["compiler"], modules)


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=1, sort_keys=True) + "\n").encode("ascii")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()
