"""A TensorRT or TensorRT-RTX engine on a device: what runs a plan, for any number of threads.

The library comes in as a module and CUDA as the small interface of _cuda.py, so that nothing here needs a GPU to be
tested. A caller takes a lane (_tensorrt_lane.py) for the length of one run. Whether a plan fits this machine is
decided before, by the backend; how one is made is not known here.

Run with a fake library and a fake CUDA alone so far: no line of this has run on a GPU.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from medcompile.backends import Executor, check_feeds
from medcompile.backends._cuda import Cuda, open_cuda
from medcompile.backends._tensorrt_lane import Lane
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.spec import GraphSpec, Profile, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

log = logging.getLogger("medcompile")

LANES = 4
"""Callers that run at once, each with a stream and memory of its own; further ones wait."""
_REBUILD = "build the bundle again on this machine: medcompile build --from BUNDLE --targets TARGET"
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def load_engine(plan: Path, spec: GraphSpec, library: ModuleType, cuda: Cuda | None = None) -> TensorRtExecutor:
    """Deserialize the plan with that library (tensorrt or tensorrt_rtx) on the first visible device.

    Raises BackendUnavailable without CUDA or for a plan that the library refuses, BackendError for one not of spec.
    """
    cuda = cuda or open_cuda()
    return TensorRtExecutor(Engine(plan, spec, library, cuda), cuda)


class TensorRtExecutor(Executor):
    """Executor of one engine. Lanes are made when callers meet; close() waits for the runs that are under way."""

    def __init__(self, engine: Engine, cuda: Cuda) -> None:
        super().__init__(engine.spec)
        self._engine = engine
        self._cuda = cuda
        self._idle: list[Lane] = []  # the warmest last
        self._made = 0
        self._closed = False
        self._change = threading.Condition()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        sizes = check_feeds(self.spec, feeds)
        with self._lane() as lane:
            return lane.run(feeds, sizes)

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
            while len(self._idle) < self._made:
                self._change.wait()
            lanes, self._idle, self._made = self._idle, [], 0
        for lane in lanes:
            lane.close()
        self._engine.close()

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        """A lane for this caller alone. One that failed is not used again: what its stream still does is unknown."""
        with self._change:
            while not (self._closed or self._idle or self._made < LANES):
                self._change.wait()
            if self._closed:
                raise self.closed()
            lane = self._idle.pop() if self._idle else None
            self._made += lane is None
        try:
            if lane is None:
                lane = Lane(self._engine, self._cuda)
            yield lane
        except BaseException:
            if lane is not None:
                with suppress(BackendError):  # the first failure is the one to tell
                    lane.close()
            with self._change:
                self._made -= 1
                self._change.notify_all()
            raise
        with self._change:
            self._idle.append(lane)
            self._change.notify_all()


class Plan:
    """A deserialized plan and the contexts made from it, but for its spec, which whoever extends this class sets.

    name: the graph's, for messages. workspace_size: bytes that a context needs.
    """

    spec: GraphSpec

    def __init__(self, plan: Path, name: str, library: Any, cuda: Cuda) -> None:
        self.name = name
        self._library = library
        self._log = logger_of(library)
        self._lock = threading.Lock()
        self._kernels: Any = None
        self._told = False
        device = cuda.device()
        try:
            data = plan.read_bytes()
        except OSError as error:
            raise BackendError(f"{plan.name} cannot be read: {error.strerror}", fix=_REBUILD) from error
        self._runtime = library.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BackendUnavailable(
                f"{library.__name__} {library.__version__} cannot load {plan.name} on {device.name} "
                f"(compute capability {'.'.join(map(str, device.compute_capability))}): {self._log.said()}",
                fix=_REBUILD,
            )
        self.workspace_size = int(self._engine.device_memory_size_v2)

    def rank(self, profile: Profile) -> int:
        """Of the profiles that hold a shape the one of the lowest rank is taken: the smallest."""
        return math.prod(axis.max for axis in profile.axes)

    def profile(self, sizes: Mapping[str, int]) -> int:
        """The index of the profile to take for sizes; check_feeds has seen that one holds them."""
        holding = [
            (self.rank(profile), index)
            for index, profile in enumerate(self.spec.profiles)
            if all(axis.min <= sizes.get(axis.name, axis.opt) <= axis.max for axis in profile.axes)
        ]
        return min(holding)[1] if holding else 0

    def context(self, workspace: int, *, of_one_shape: bool) -> Any:
        """A new context that computes in the memory at workspace, which it shares with the others of its stream."""
        managed = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:
            if hasattr(self._engine, "create_runtime_config"):
                config = self._engine.create_runtime_config()
                config.set_execution_context_allocation_strategy(managed)
                if hasattr(config, "create_runtime_cache"):  # kernels compiled for one context serve the others
                    self._kernels = self._kernels or config.create_runtime_cache()
                    config.set_runtime_cache(self._kernels)
                if of_one_shape and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
                    # Else a graph would keep the fallback kernels that run while the right ones are being compiled.
                    eager = self._library.DynamicShapesKernelSpecializationStrategy.EAGER
                    config.dynamic_shapes_kernel_specialization_strategy = eager
                context = self._engine.create_execution_context(config)
            else:
                context = self._engine.create_execution_context(managed)
        if context is None:
            raise self.error("no execution context could be made")
        if self.workspace_size:
            context.set_device_memory(workspace, self.workspace_size)
        return context

    def error(self, what: str) -> BackendError:
        return BackendError(
            f"{self.name}: {what}: {self._log.said()}",
            fix="nvidia-smi shows whether the GPU is well and has memory left; if it is, build the bundle again here",
        )

    def note_refused_graph(self, shape: str, error: BackendError) -> None:
        """Tell once aloud that a shape goes without a CUDA graph: it costs some latency and changes no result."""
        level = logging.DEBUG if self._told else logging.WARNING
        self._told = True
        log.log(level, "%s: no CUDA graph for %s, it is enqueued each time: %s", self.name, shape, error.message)

    def close(self) -> None:
        self._engine = self._runtime = self._kernels = None

    def tensor_names(self) -> list[str]:
        return sorted(self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors))

    def misfits(self, tensor: TensorSpec) -> list[str]:
        """How a tensor of the engine differs from what it should be, in dtype and kind of memory."""
        found = []
        dtype = self._engine.get_tensor_dtype(tensor.name).name
        if _DTYPES.get(dtype) != tensor.dtype:
            found.append(f"{tensor.name} is {dtype}, and the graph says {tensor.dtype}")
        if self._engine.get_tensor_location(tensor.name) != self._library.TensorLocation.DEVICE:
            found.append(f"{tensor.name} decides a shape and lies in host memory, which is not supported")
        return found

    def refuse(self, plan: Path, wrong: str) -> BackendError:
        """The error of a plan that is another graph's."""
        return BackendError(f"{plan.name} is not the engine of graph {self.name}: {wrong}", fix=_REBUILD)


class Engine(Plan):
    """A plan held to its spec."""

    def __init__(self, plan: Path, spec: GraphSpec, library: Any, cuda: Cuda) -> None:
        super().__init__(plan, spec.name, library, cuda)
        self.spec = spec
        if wrong := self._differences():
            raise self.refuse(plan, wrong[0])

    def _differences(self) -> list[str]:
        """How the engine's face differs from the spec's: names, dtypes, kind of memory, axes, profiles."""
        engine, spec = self._engine, self.spec
        tensors = (*spec.inputs, *spec.outputs)
        names = self.tensor_names()
        wanted = sorted(tensor.name for tensor in tensors)
        if names != wanted:
            return [f"it has {', '.join(names)}, and the graph {', '.join(wanted)}"]
        found = []
        dynamic = {dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)}
        for tensor in tensors:
            found += self.misfits(tensor)
            if unknown := {dim for dim in tensor.shape if isinstance(dim, str)} - dynamic:
                found.append(f"{tensor.name} has axes that no input has: {', '.join(sorted(unknown))}")
        if engine.num_optimization_profiles != max(1, len(spec.profiles)):
            return [*found, f"it has {engine.num_optimization_profiles} profiles, and the graph {len(spec.profiles)}"]
        for index, profile in enumerate(spec.profiles):
            for tensor in spec.inputs:
                low, _, high = engine.get_tensor_profile_shape(tensor.name, index)
                limits = _limits(tensor, profile)
                if (tuple(low), tuple(high)) != limits:
                    held = f"{list(low)} to {list(high)}, and the graph {list(limits[0])} to {list(limits[1])}"
                    found.append(f"its profile {profile.name} takes {tensor.name} of {held}")
        return found


def _limits(tensor: TensorSpec, profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest and the largest shape of an input in a profile."""
    axes = [profile.axis(dim) if isinstance(dim, str) else dim for dim in tensor.shape]
    low = tuple(axis if isinstance(axis, int) else axis.min for axis in axes)
    return low, tuple(axis if isinstance(axis, int) else axis.max for axis in axes)


@functools.cache
def logger_of(library: Any) -> Any:
    """The one logger that a process gives to that library, which keeps its last errors in words."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self._errors.append(message.strip())
            log.debug("%s: %s", library.__name__, message)

        def said(self) -> str:
            """The errors since this was asked last."""
            told = [self._errors.popleft() for _ in range(len(self._errors))]
            return "; ".join(told) or "the library gave no reason"

    return Log()
