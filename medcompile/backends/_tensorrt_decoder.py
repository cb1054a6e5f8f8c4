"""A decoder's TensorRT engine behind the runtime's StepModel: pools that stay on the device, and a lane for the rest.

A pool is bound by address, as the input that it is and, where the engine lists it, as the output that is the same
memory; so a step copies the six integer inputs there and the logits back, whatever the pools' size. The face is read
off the engine, whose names are those of runtime/decoder.py. Which plans fit this machine is the backend's business.

Run with a fake library and a fake CUDA alone so far: no line of this has run on a GPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends import check_feeds
from medcompile.backends._cuda import Cuda, open_cuda
from medcompile.backends._host_pools import POOLS
from medcompile.backends._tensorrt_executor import Plan
from medcompile.backends._tensorrt_lane import Lane
from medcompile.errors import BackendError
from medcompile.spec import Axis, GraphSpec, Profile, TensorSpec

if TYPE_CHECKING:
    from medcompile.runtime.decoder import StepBatch

    Array = np.ndarray[Any, Any]

log = logging.getLogger("medcompile")

_STEP = (
    TensorSpec("input_ids", "int64", ("tokens",)),
    TensorSpec("positions", "int64", ("tokens",)),
    TensorSpec("query_starts", "int32", ("bounds",)),
    TensorSpec("past_lens", "int32", ("sequences",)),
    TensorSpec("block_table", "int32", ("sequences", "table")),
    TensorSpec("logit_rows", "int64", ("rows",)),
)
_LOGITS = "logits"
_UPDATED = "/updated"
"""What follows a pool's name where an engine lists it as an output too (rewrites/tensorrt.py)."""
_ITEM_BYTES = {"HALF": 2, "BF16": 2, "FLOAT": 4}


def load_step_model(
    plan: Path, library: Any, *, blocks: int, profiles: Sequence[str], cuda: Cuda | None = None
) -> TensorRtStepModel:
    """Deserialize a decoder's plan on the first visible device, with pools of blocks, or as many as its profiles hold.

    profiles: their names, in the engine's order. Raises BackendUnavailable without CUDA or for a plan that the library
    refuses, BackendError for one of another kind or without room for its pools.
    """
    cuda = cuda or open_cuda()
    return TensorRtStepModel(PagedEngine(plan, library, cuda, blocks=blocks, profiles=profiles), cuda)


class PagedEngine(Plan):
    """A decoder's plan. spec: its face, with pools of a fixed size. pools: their names, and the bytes of a block."""

    def __init__(self, plan: Path, library: Any, cuda: Cuda, *, blocks: int, profiles: Sequence[str]) -> None:
        super().__init__(plan, "generate", library, cuda)
        engine, there = self._engine, self.tensor_names()
        updated = [name for name in there if name.endswith(_UPDATED)]
        pools = [name for name in there if name.startswith(POOLS) and name not in updated]
        inputs = tuple(tensor for tensor in _STEP if tensor.name in there)
        known = {*(t.name for t in inputs), *pools, *(name for name in updated if name.removesuffix(_UPDATED) in pools)}
        if not pools or {*there} - known != {_LOGITS} or engine.num_optimization_profiles != len(profiles):
            raise self.refuse(plan, f"it has {', '.join(there)} and {engine.num_optimization_profiles} profiles")
        logits = TensorSpec(_LOGITS, "float32", ("rows", int(tuple(engine.get_tensor_shape(_LOGITS))[1])))
        if wrong := [misfit for tensor in (*inputs, logits) for misfit in self.misfits(tensor)]:
            raise self.refuse(plan, wrong[0])
        most = [engine.get_tensor_profile_shape(pools[0], index)[2] for index in range(len(profiles))]
        shape = (min(blocks, *(int(end[0]) for end in most)), *map(int, tuple(most[0])[1:]))
        if shape[0] < blocks:
            log.info("%s: the engine's profiles hold %d blocks, and not %d", self.name, shape[0], blocks)
        self.blocks, _, self.block_size, _ = shape
        self.vocabulary = int(logits.shape[1])
        self.pools: dict[str, int] = {}
        for name in pools:
            dtype = engine.get_tensor_dtype(name).name
            if dtype not in _ITEM_BYTES:
                raise self.refuse(plan, f"{name} is {dtype}")
            self.pools[name] = math.prod(shape[1:]) * _ITEM_BYTES[dtype]
        held = tuple(TensorSpec(name, "", shape) for name in pools)  # what is in them no one here looks at
        self.spec = GraphSpec(
            self.name,
            (*inputs, *held),
            (logits, *(TensorSpec(name, "", shape) for name in updated)),
            tuple(Profile(name, self._axes(inputs, index)) for index, name in enumerate(profiles)),
        )
        self.updated = {name: name.removesuffix(_UPDATED) for name in updated}

    def rank(self, profile: Profile) -> int:
        """That of the fewest usual tokens: where a step fits the profile of decoding, that one."""
        return profile.axis("tokens").opt

    def _axes(self, inputs: Sequence[TensorSpec], index: int) -> tuple[Axis, ...]:
        axes: dict[str, Axis] = {}
        for tensor in inputs:
            ends = zip(*self._engine.get_tensor_profile_shape(tensor.name, index), strict=True)
            for dim, sizes in zip(map(str, tensor.shape), ends, strict=True):
                axes[dim] = Axis(dim, *map(int, sizes))
        return tuple(sorted(axes.values(), key=lambda axis: axis.name == "bounds"))  # errors name sequences first


class TensorRtStepModel:
    """One decoder's engine, and pools of so many blocks. Not thread-safe: a scheduler steps it alone.

    One that failed is closed: what its stream still does, and what its pools then hold, is unknown.
    """

    def __init__(self, engine: PagedEngine, cuda: Cuda) -> None:
        self.blocks, self.block_size, self.vocabulary = engine.blocks, engine.block_size, engine.vocabulary
        self._cuda = cuda
        self._block_bytes = engine.pools
        self._pools: dict[str, int] = {}
        step = tuple(tensor for tensor in engine.spec.inputs if tensor.name not in engine.pools)
        self._face = replace(engine.spec, inputs=step)
        with ExitStack() as stack:  # what is taken last goes first: work on the stream, then the pools it uses
            stack.callback(engine.close)
            for name, size in engine.pools.items():
                self._pools[name] = cuda.malloc(self.blocks * size)
                stack.callback(cuda.free, self._pools[name])
            updated = {name: self._pools[pool] for name, pool in engine.updated.items()}
            self._lane: Lane | None = Lane(engine, cuda, self._pools | updated, captures=False)
            stack.callback(self._lane.close)
            for name, size in engine.pools.items():
                # Zeros, for what lies in a block beyond a sequence's end is multiplied, by nothing, all the same.
                cuda.zero(self._pools[name], self.blocks * size, self._lane.stream)
            self._closing = stack.pop_all()

    @property
    def pool_bytes(self) -> int:
        """Of all blocks of all layers."""
        return self.blocks * sum(self._block_bytes.values())

    def step(self, batch: StepBatch) -> Array:
        """Compute the batch's new tokens. Returns float32 logits [rows, vocabulary].

        Raises ProfileError, which names the axis, for a batch outside every profile; BackendError where the device
        fails.
        """
        lane = self._open()
        feeds = {tensor.name: getattr(batch, tensor.name) for tensor in self._face.inputs}
        rows = len(batch.logit_rows)
        if not rows:
            feeds["logit_rows"] = np.zeros(1, np.int64)  # no profile holds an empty tensor
        sizes = check_feeds(self._face, feeds)
        try:
            return lane.run(feeds, sizes)[_LOGITS][:rows]
        except BaseException:
            self._give_up()
            raise

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, source to destination, in every layer, before the next step. Pairs are copied in order."""
        lane = self._open()
        try:
            for name, address in self._pools.items():
                size = self._block_bytes[name]
                for source, destination in pairs:
                    self._cuda.copy_on_device(address + destination * size, address + source * size, size, lane.stream)
        except BaseException:
            self._give_up()
            raise

    def close(self) -> None:
        self._lane = None
        self._closing.close()

    def _open(self) -> Lane:
        if self._lane is None:
            raise BackendError("this decoder is closed", fix="load the bundle again")
        return self._lane

    def _give_up(self) -> None:
        with suppress(BackendError):  # the first failure is the one to tell
            self.close()
