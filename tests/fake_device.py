"""A backend that builds anywhere and runs only where its device is: the typed graph behind a switch.

What it "builds" is a file that names the graph; on the device it runs that graph with ONNX Runtime on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import backends, run_onnx
from medcompile.backends import Built, Executor
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.spec import ABSENT, GraphSpec, Target, Variant

NAME = "tensorrt-rtx"


class Device(Executor):
    def __init__(self, path: Path, spec: GraphSpec, noise: float) -> None:
        super().__init__(spec)
        self._session: Any = run_onnx.session(Path(path.read_text()))
        self._noise = noise

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        names = [t.name for t in self.outputs]
        answers = self._session.run(names, dict(feeds))
        return {
            n: a + np.float32(self._noise) * (np.arange(a.shape[-1]) % 2) for n, a in zip(names, answers, strict=True)
        }

    def close(self) -> None: ...


@dataclass
class FakeGpu:
    """here: its device is in this machine. refuses: variants it can't take. noise: what it adds to answers.
    takes: what its engines are built for; misfit: the device does not take them all the same."""

    here: bool = False
    refuses: tuple[str, ...] = ()
    noise: float = 0.0
    takes: str = "fk_80+"
    misfit: bool = False
    name: str = "tensorrt"
    targets: tuple[str, ...] = (NAME,)

    @property
    def _version(self) -> str:
        """What it refuses is part of it, so that no engine comes out of a cache that it would not build."""
        return f"1.{len(self.refuses)}"

    def probe(self, target: str) -> Target:
        return Target(target, self.name, "gpu", "fk_90" if self.here else ABSENT, "linux", self._version)

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        if variant.name in self.refuses:
            raise BackendError(f"it does not take {variant.name}", fix=f"leave out {variant.name}")
        (out / "engine.txt").write_text(str(onnx_path))
        return Built(
            "engine.txt", Target(target.name, self.name, "gpu", self.takes, "linux", target.version), ("a note",)
        )

    def load(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None) -> Executor:
        if not self.here:
            raise BackendUnavailable("no fake GPU in this machine", fix="plug one in")
        if self.misfit:
            raise BackendError("the library refuses it on fk_90", fix="build it for fk_90")
        return Device(path, spec, self.noise)


def install(monkeypatch: pytest.MonkeyPatch, **how: Any) -> FakeGpu:
    """Let it stand for TensorRT in one test."""
    fake = FakeGpu(**how)
    get = backends.get
    monkeypatch.setattr(backends, "get", lambda name: fake if name == fake.name else get(name))
    return fake
