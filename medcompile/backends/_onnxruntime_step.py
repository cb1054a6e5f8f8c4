"""What decoders on ONNX Runtime's CPU provider have in common: a bound session, pools in memory, steps.

How a batch is laid out for the graph, and how its pools are bound, is each form's own business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends._host_pools import POOLS, HostPools
from medcompile.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime as ort

    from medcompile.runtime.decoder import StepBatch

    Array = np.ndarray[Any, Any]


class BoundStepModel(HostPools, ABC):
    """One decoder's session, and pools of so many blocks. Not thread-safe: a scheduler steps it alone."""

    def __init__(self, session: ort.InferenceSession, *, blocks: int, block_size: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.block_size = block_size
        self.vocabulary = int(session.get_outputs()[0].shape[1])
        self._session: ort.InferenceSession | None = session
        self._binding = session.io_binding()
        self._inputs = {node.name for node in session.get_inputs() if not node.name.startswith(POOLS)}

    @abstractmethod
    def _feeds(self, batch: StepBatch) -> Mapping[str, Array]:
        """The graph's inputs but for its pools, contiguous; what the graph does not have is left out by step()."""

    def step(self, batch: StepBatch) -> Array:
        """Compute the batch's new tokens. Returns float32 logits [rows, vocabulary]."""
        if self._session is None:
            raise BackendError("this decoder is closed", fix="load the bundle again")
        feeds = self._feeds(batch)
        for name in feeds.keys() & self._inputs:
            self._binding.bind_cpu_input(name, feeds[name])
        logits = np.empty((len(batch.logit_rows), self.vocabulary), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except RuntimeError as error:
            raise BackendError(f"ONNX Runtime failed: {str(error).strip().partition(chr(10))[0]}") from error
        return logits

    def close(self) -> None:
        self._session = None
        self._binding = None
        self._pools = []
