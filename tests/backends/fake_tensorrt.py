"""A TensorRT whose engines are numpy functions over the memory of a FakeCuda: what of the library an executor uses.

A context refuses what the real one refuses, and raises a Fault for what the real one leaves undefined: a graph that is
launched after its context was changed, a capture without a warm-up, tensors that overlap, a workspace of two streams.
Inputs that an engine updates in place are computed upon where they lie; an output that is one of them must lie there.
"""

from __future__ import annotations

import enum
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from medcompile.spec import GraphSpec
from tests.backends.fake_cuda import LIVING, FakeCuda, Fault, Work

PLAN = b"a plan of the fake"
Compute = Callable[[dict[str, np.ndarray[Any, Any]]], dict[str, np.ndarray[Any, Any]]]


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    INT32 = 3
    BF16 = 4


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


_DTYPES = {"float32": DataType.FLOAT, "float16": DataType.HALF, "int64": DataType.INT64, "int32": DataType.INT32}


@dataclass
class Fake:
    """What the engine that a plan holds shall be like. Change a field before load_engine() to get another one.

    aliases: the outputs that are inputs, updated in place.
    """

    cuda: FakeCuda
    spec: GraphSpec
    compute: Compute
    workspace_size: int = 1 << 20
    capturable: bool = True
    dtypes: dict[str, DataType] = field(default_factory=dict)
    locations: dict[str, TensorLocation] = field(default_factory=dict)
    profiles: int | None = None
    contexts_left: int = 1000
    refuse_capture: bool = False
    aliases: dict[str, str] = field(default_factory=dict)
    contexts: list[str] = field(default_factory=list)
    profiles_set: list[int] = field(default_factory=list)

    def library(self, *, configurable: bool = True) -> ModuleType:
        """The module. configurable: has runtime configurations, as TensorRT-RTX and later TensorRT have."""
        module = ModuleType("fake_tensorrt")
        classes = (TensorLocation, ExecutionContextAllocationStrategy, DynamicShapesKernelSpecializationStrategy)
        for value in (*classes, ILogger):
            setattr(module, value.__name__, value)
        fake = self

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                self._logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
                if plan != PLAN:
                    self._logger.log(ILogger.ERROR, "Serialization assertion header.magicTag failed")
                    return None
                return (Configurable if configurable else Engine)(fake, self._logger)

        module.Runtime = Runtime  # type: ignore[attr-defined]
        module.__version__ = "99.1"
        return module


class Engine:
    def __init__(self, fake: Fake, logger: ILogger) -> None:
        self.fake = fake
        self.logger = logger
        self.tensors = [*fake.spec.inputs, *fake.spec.outputs]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = fake.profiles or max(1, len(fake.spec.profiles))
        self.device_memory_size_v2 = fake.workspace_size

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_dtype(self, name: str) -> DataType:
        spec = next(t for t in self.tensors if t.name == name)
        return self.fake.dtypes.get(name, _DTYPES[spec.dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        spec = next(t for t in self.tensors if t.name == name)
        return tuple(-1 if isinstance(d, str) else d for d in spec.shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return self.fake.locations.get(name, TensorLocation.DEVICE)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Sequence[int]]:
        spec = next(t for t in self.tensors if t.name == name)
        profile = self.fake.spec.profiles[index]
        return [
            tuple(getattr(profile.axis(d), end) if isinstance(d, str) else d for d in spec.shape)
            for end in ("min", "opt", "max")
        ]

    def create_execution_context(self, asked: Any) -> Context | None:
        if self.fake.contexts_left == 0:
            self.logger.log(ILogger.ERROR, "no memory for one more context")
            return None
        self.fake.contexts_left -= 1
        eager = getattr(asked, "dynamic_shapes_kernel_specialization_strategy", None)
        self.fake.contexts.append(eager.name if eager else "")
        return Context(self)


class Configuration:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cache: object = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> None:
        self.cache = cache


class Configurable(Engine):
    def create_runtime_config(self) -> Configuration:
        return Configuration()


class Context:
    _numbers = itertools.count()

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.fake = engine.fake
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.workspace = 0
        self.state = next(self._numbers)  # changes with every change of the context
        self.warm = -1  # the state that was last enqueued
        LIVING.add(self)

    def set_device_memory(self, address: int, size: int) -> None:
        if size < self.fake.workspace_size:
            raise Fault(f"a workspace of {size} bytes, {self.fake.workspace_size} are needed")
        self.fake.cuda.device_bytes(address, size)
        self.workspace = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.fake.cuda.stream(stream)
        self.profile, self.shapes = index, {}
        self.fake.profiles_set.append(index)
        self.state = next(self._numbers)
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None:
            raise Fault("a shape before a profile")
        if self.fake.spec.profiles:
            low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
            if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return False
        self.shapes[name] = tuple(shape)
        self.state = next(self._numbers)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256:
            raise Fault(f"{name} at {address:#x} is not aligned to 256 bytes")
        self.addresses[name] = address
        self.state = next(self._numbers)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for tensor in self.fake.spec.inputs:
            sizes.update(
                {d: s for d, s in zip(tensor.shape, self.shapes[tensor.name], strict=True) if isinstance(d, str)}
            )
        spec = next(t for t in self.engine.tensors if t.name == name)
        return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)

    def is_stream_capturable(self, stream: int) -> bool:
        self.fake.cuda.stream(stream)
        return self.fake.capturable

    def execute_async_v3(self, stream: int) -> bool:
        cuda, spec, state = self.fake.cuda, self.fake.spec, self.state
        capturing = cuda.stream(stream).capturing is not None
        if capturing and self.warm != state:
            raise Fault("a capture of a shape that was not enqueued before")
        if capturing and self.fake.refuse_capture:
            cuda.spoil(stream, "operation not permitted when stream is capturing")
            return False
        self.warm = state
        places = {t.name: (self.addresses[t.name], self._size(t)) for t in self.engine.tensors}
        for output, source in self.fake.aliases.items():
            if places.pop(output) != places[source]:
                raise Fault(f"{output} lies elsewhere than {source}")
        scratch = [(self.workspace, self.fake.workspace_size)] if self.fake.workspace_size else []
        ranges = [*places.values(), *scratch]
        for first, second in itertools.combinations(ranges, 2):
            if first[0] < second[0] + second[1] and second[0] < first[0] + first[1]:
                raise Fault(f"two tensors overlap at {max(first[0], second[0]):#x}")
        shapes = {t.name: self.get_tensor_shape(t.name) for t in self.engine.tensors}
        outputs = {t.name for t in spec.outputs}
        living, compute = weakref.ref(self), self.fake.compute  # work must not keep its context alive

        def do() -> None:
            context = living()
            if context is None or context.state != state:
                raise Fault("a graph runs whose context was changed or let go since it was captured")
            feeds = {
                t.name: cuda.device_bytes(*places[t.name]).view(t.dtype).reshape(shapes[t.name]) for t in spec.inputs
            }
            for name, value in compute(feeds).items():
                assert value.shape == shapes[name]
                cuda.device_bytes(*places[name])[:] = np.ascontiguousarray(value).view(np.uint8).reshape(-1)

        reads = [place for name, place in places.items() if name not in outputs]
        writes = [place for name, place in places.items() if name in outputs]
        cuda.put(stream, Work(do, reads, [*writes, *scratch]))
        return True

    def _size(self, tensor: Any) -> int:
        shape = self.get_tensor_shape(tensor.name)
        return int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize


def summing(feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """An engine whose outputs tell every element of its inputs, and where it stood."""
    weighted = {n: (a * np.arange(1, a.shape[1] + 1)).astype(np.float32) for n, a in feeds.items()}
    rows = np.stack([a.sum(1) for a in weighted.values()], axis=1)
    return {"embedding": rows, "logits": np.stack(list(weighted.values()), axis=2)}
