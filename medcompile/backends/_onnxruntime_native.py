"""Decoders on ONNX Runtime's CPU provider with our own kernels, behind the runtime's StepModel. Loading half.

Pools are arrays that this class owns. The graph's attention writes into them, so they are inputs alone, bound once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import BackendError
from medcompile.kernels.native import ATTENTION_BLOCK

if TYPE_CHECKING:
    import onnxruntime as ort

    from medcompile.runtime.decoder import StepBatch

    Array = np.ndarray[Any, Any]

_POOLS = ("k_pool.", "v_pool.")
_BFLOAT16 = 16  # TensorProto's number; numpy has no such type, so its pools are uint16 here


class OnnxRuntimeNativeStepModel:
    """One decoder's session, and pools of so many blocks. Not thread-safe: a scheduler steps it alone."""

    block_size = ATTENTION_BLOCK

    def __init__(self, session: ort.InferenceSession, *, blocks: int) -> None:
        self.blocks = blocks
        self.vocabulary = int(session.get_outputs()[0].shape[1])
        self._session: ort.InferenceSession | None = session
        self._binding = session.io_binding()
        self._inputs = {node.name for node in session.get_inputs()}
        self._pools: list[Array] = []
        for node in session.get_inputs():
            if node.name.startswith(_POOLS):
                narrow = node.type == "tensor(bfloat16)"
                pool = np.zeros((blocks, *node.shape[1:]), np.uint16 if narrow else np.float32)
                kind = _BFLOAT16 if narrow else np.float32
                self._binding.bind_input(node.name, "cpu", 0, kind, pool.shape, pool.ctypes.data)
                self._pools.append(pool)  # takes memory as blocks are written

    @property
    def pool_bytes(self) -> int:
        """Of all blocks of all layers."""
        return sum(pool.nbytes for pool in self._pools)

    def step(self, batch: StepBatch) -> Array:
        """Compute the batch's new tokens. Returns float32 logits [rows, vocabulary]."""
        if self._session is None:
            raise BackendError("this decoder is closed", fix="load the bundle again")
        feeds = {
            "input_ids": batch.input_ids,
            "positions": batch.positions,
            "query_starts": batch.query_starts,
            "past_lens": batch.past_lens,
            "block_table": batch.block_table,
            "logit_rows": batch.logit_rows,
        }
        for name in feeds.keys() & self._inputs:
            self._binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name]))
        logits = np.empty((len(batch.logit_rows), self.vocabulary), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except RuntimeError as error:
            raise BackendError(f"ONNX Runtime failed: {str(error).strip().partition(chr(10))[0]}") from error
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, source to destination, in every layer. Pairs are copied in order."""
        for source, destination in pairs:
            for pool in self._pools:
                pool[destination] = pool[source]

    def close(self) -> None:
        self._session = None
        self._binding = None
        self._pools = []
