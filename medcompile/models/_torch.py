"""A torch module behind an Executor's face: how the reference is run. Build time only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medcompile.backends import Executor
from medcompile.spec import GraphSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class TorchExecutor(Executor):
    """Runs module(*inputs in spec order) under inference mode. The module returns one tensor, the only output."""

    def __init__(self, spec: GraphSpec, module: Any) -> None:
        super().__init__(spec)
        self._module = module

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            result = self._module(*(torch.from_numpy(feeds[t.name]) for t in self.spec.inputs))
        return {self.spec.outputs[0].name: result.float().numpy()}

    def close(self) -> None:
        self._module = None
