"""Decoders on ONNX Runtime's CUDA provider, behind the runtime's StepModel. Loading half: no onnx here.

rewrites/onnxruntime_cuda.py says what the graph takes: its operator reads the step's integer inputs as they are, so a
step is bound and run. The pools are device memory of this class, in the operator's layout, bound once by address.

Run with a fake session and a fake CUDA alone so far: no line of this has run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends._cuda import Cuda
from medcompile.backends._host_pools import POOLS
from medcompile.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime as ort

    from medcompile.runtime.decoder import StepBatch

    Array = np.ndarray[Any, Any]

BLOCK_SIZE = 32
_TYPES = {"tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX's numbers of the types that the operator takes, by the library's names of them."""
_ITEM_BYTES = 2


class OnnxRuntimeCudaStepModel:
    """One decoder's session, and pools of so many blocks. Not thread-safe: a scheduler steps it alone.

    One that failed is closed: what its pools then hold is unknown.
    """

    block_size = BLOCK_SIZE

    def __init__(self, session: ort.InferenceSession, cuda: Cuda, *, blocks: int) -> None:
        self.blocks = blocks
        self.vocabulary = int(session.get_outputs()[0].shape[1])
        self._session: ort.InferenceSession | None = session
        self._binding = session.io_binding()
        self._cuda = cuda
        self._pools: dict[int, int] = {}  # bytes of a block, by address
        self._inputs = [node.name for node in session.get_inputs() if not node.name.startswith(POOLS)]
        with ExitStack() as stack:
            self._stream = cuda.create_stream()
            stack.callback(cuda.destroy_stream, self._stream)
            for node in session.get_inputs():
                if node.name in self._inputs:
                    continue
                shape = (blocks, BLOCK_SIZE, *node.shape[2:])
                size = math.prod(shape[1:]) * _ITEM_BYTES
                address = cuda.malloc(blocks * size)
                stack.callback(cuda.free, address)
                self._pools[address] = size
                self._binding.bind_input(node.name, "cuda", 0, _TYPES[node.type], shape, address)
            stack.callback(cuda.synchronize, self._stream)
            for address, size in self._pools.items():
                # Zeros, for what lies in a block beyond a sequence's end is multiplied, by nothing, all the same.
                cuda.zero(address, blocks * size, self._stream)
            cuda.synchronize(self._stream)
            self._closing = stack.pop_all()

    @property
    def pool_bytes(self) -> int:
        """Of all blocks of all layers."""
        return self.blocks * sum(self._pools.values())

    def step(self, batch: StepBatch) -> Array:
        """Compute the batch's new tokens. Returns float32 logits [rows, vocabulary]."""
        session = self._open()
        for name in self._inputs:
            self._binding.bind_cpu_input(name, np.ascontiguousarray(getattr(batch, name)))
        logits = np.empty((len(batch.logit_rows), self.vocabulary), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            session.run_with_iobinding(self._binding)
        except RuntimeError as error:  # what the library raises where inputs are bound
            self._give_up()
            raise BackendError(f"ONNX Runtime failed: {str(error).strip().partition(chr(10))[0]}") from error
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, source to destination, in every layer. Pairs are copied in order."""
        self._open()
        try:
            for address, size in self._pools.items():
                for source, destination in pairs:
                    self._cuda.copy_on_device(address + destination * size, address + source * size, size, self._stream)
            self._cuda.synchronize(self._stream)  # the library runs on a stream of its own
        except BackendError:
            self._give_up()
            raise

    def close(self) -> None:
        self._session = self._binding = None
        self._closing.close()

    def _open(self) -> ort.InferenceSession:
        if self._session is None:
            raise BackendError("this decoder is closed", fix="load the bundle again")
        return self._session

    def _give_up(self) -> None:
        with suppress(BackendError):  # the first failure is the one to tell
            self.close()
