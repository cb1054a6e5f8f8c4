"""The null backend: checks what it is fed against the graph's face, and answers zeros.

It needs no library and no device, so that whatever sits on a backend can be tested without one. It is never picked
on its own: its answers mean nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medcompile
from medcompile.backends import Built, Executor, check_feeds
from medcompile.errors import BackendError
from medcompile.spec import GraphSpec, Target, Variant

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class NullBackend:
    name = "null"
    targets = ("null",)

    def probe(self, target: str) -> Target:
        return Target(target, self.name, "none", platform.machine(), platform.system().lower(), medcompile.__version__)

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        """Leave the graph's name in a file: there is nothing to lower."""
        (out / "null.txt").write_text(f"{spec.name}\n", encoding="utf-8")
        return Built("null.txt", target, ("answers zeros",))

    def load(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None) -> NullExecutor:
        if path.read_text(encoding="utf-8") != f"{spec.name}\n":
            raise BackendError(f"{path.name} was not built from graph {spec.name}", fix="build the bundle again")
        return NullExecutor(spec)


class NullExecutor(Executor):
    def __init__(self, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._closed = False

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Zeros in the shape of every output; an axis that no input names is 1 long."""
        import numpy as np

        sizes = check_feeds(self.spec, feeds)
        if self._closed:
            raise self.closed()
        return {
            tensor.name: np.zeros([sizes.get(d, 1) if isinstance(d, str) else d for d in tensor.shape], tensor.dtype)
            for tensor in self.spec.outputs
        }

    def close(self) -> None:
        self._closed = True


BACKEND = NullBackend()
