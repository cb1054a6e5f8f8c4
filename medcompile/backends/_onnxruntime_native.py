"""Decoders on ONNX Runtime's CPU provider with our own kernels, behind the runtime's StepModel. Loading half.

Pools are arrays that this class owns. The graph's attention writes into them, so they are inputs alone, bound once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends._host_pools import POOLS
from medcompile.backends._onnxruntime_step import BoundStepModel
from medcompile.kernels.native import ATTENTION_BLOCK

if TYPE_CHECKING:
    import onnxruntime as ort

    from medcompile.runtime.decoder import StepBatch

    Array = np.ndarray[Any, Any]

_BFLOAT16 = 16  # TensorProto's number; numpy has no such type, so its pools are uint16 here


class OnnxRuntimeNativeStepModel(BoundStepModel):
    """A decoder whose graph reads the step's integers as they are."""

    def __init__(self, session: ort.InferenceSession, *, blocks: int) -> None:
        super().__init__(session, blocks=blocks, block_size=ATTENTION_BLOCK)
        for node in session.get_inputs():
            if node.name.startswith(POOLS):
                narrow = node.type == "tensor(bfloat16)"
                pool = np.zeros((blocks, *node.shape[1:]), np.uint16 if narrow else np.float32)
                kind = _BFLOAT16 if narrow else np.float32
                self._binding.bind_input(node.name, "cpu", 0, kind, pool.shape, pool.ctypes.data)
                self._pools.append(pool)  # takes memory as blocks are written

    def _feeds(self, batch: StepBatch) -> dict[str, Array]:
        return {name: np.ascontiguousarray(getattr(batch, name)) for name in self._inputs}
