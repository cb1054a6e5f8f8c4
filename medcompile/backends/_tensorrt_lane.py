"""A lane: one CUDA stream with its memory and TensorRT contexts, for one caller at a time.

All inputs of a run lie side by side in the lane's memory, and so do all outputs, on the device as in page-locked host
memory, so that there is one copy each way; the memory grows by doubling and is kept. A shape that keeps coming gets a
context of its own and a CUDA graph of copies and kernels: what a graph does is undefined once the context that it was
captured from is changed, so the lane's shared context, which is set anew for each shape, is never captured.

Tensors that outlive a run (a decoder's pools) lie elsewhere: the lane binds them by address and copies nothing of them.
"""

from __future__ import annotations

import ctypes
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from medcompile.backends._cuda import Cuda
from medcompile.errors import BackendError
from medcompile.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

Sizes = Mapping[str, int]
"""The size of every dynamic axis, by name, always in the order of the graph's inputs."""
Key = tuple[tuple[str, int], ...]

GRAPHS = 16
"""CUDA graphs that one lane keeps; the one that was used least recently goes first."""
REPEATS = 3
"""A shape gets its graph when it comes for this time: a stream of ever new lengths must not pay for graphs."""
_ALIGN_BYTES = 256
_SMALLEST_BYTES = 1 << 16


class Contexts(Protocol):
    """What a lane asks of the engine."""

    spec: GraphSpec
    workspace_size: int

    def profile(self, sizes: Sizes) -> int: ...
    def context(self, workspace: int, *, of_one_shape: bool) -> Any: ...
    def error(self, what: str) -> BackendError: ...
    def note_refused_graph(self, shape: str, error: BackendError) -> None: ...


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of one shape lie in a lane's memory, in bytes: first the inputs, then the outputs.

    shapes has all tensors, places those that are not resident.
    """

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, int]
    inputs_end: int
    outputs_start: int
    end: int

    @classmethod
    def of(cls, spec: GraphSpec, sizes: Sizes, resident: Mapping[str, int]) -> _Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, int] = {}
        end = inputs_end = 0
        for tensor in (*spec.inputs, *spec.outputs):
            shapes[tensor.name] = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
            if tensor.name in resident:
                continue
            places[tensor.name] = -(-end // _ALIGN_BYTES) * _ALIGN_BYTES
            end = places[tensor.name] + math.prod(shapes[tensor.name]) * np.dtype(tensor.dtype).itemsize
            if tensor in spec.inputs:
                inputs_end = end
        outputs = [places[tensor.name] for tensor in spec.outputs if tensor.name in places]
        return cls(shapes, places, inputs_end, outputs[0], end)


@dataclass
class _Ready:
    """A context whose profile, shapes and addresses are set, and the run's tensors in host memory."""

    context: Any
    layout: _Layout
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    graph: int | None = None


class Lane:
    """resident: addresses of tensors that the caller holds, by name. captures: whether shapes that keep coming get
    graphs; not worth it where shapes change every few runs, as a decoder's do."""

    def __init__(
        self, engine: Contexts, cuda: Cuda, resident: Mapping[str, int] | None = None, *, captures: bool = True
    ) -> None:
        self._engine = engine
        self._cuda = cuda
        self._resident = resident or {}
        self._captures = captures
        ends = [{axis.name: axis.max for axis in profile.axes} for profile in engine.spec.profiles]
        self._most = max(_Layout.of(engine.spec, sizes, self._resident).end for sizes in ends or [{}])
        self._size = self._device = self._host = 0
        self._own: OrderedDict[Key, _Ready] = OrderedDict()  # shapes with a context of their own, oldest first
        self._last: tuple[Key, _Ready] | None = None  # what the shared context is set to
        self._profile: int | None = None  # the shared context's
        self._seen: dict[Key, int] = {}  # at most one entry for each shape that the profiles hold
        self._refused: set[Key] = set()
        with ExitStack() as stack:
            self.stream = cuda.create_stream()
            stack.callback(cuda.destroy_stream, self.stream)
            self._workspace = cuda.malloc(engine.workspace_size) if engine.workspace_size else 0
            if self._workspace:
                stack.callback(cuda.free, self._workspace)
            self._shared = engine.context(self._workspace, of_one_shape=False)
            self._closing = stack.pop_all()

    def run(self, feeds: Mapping[str, Array], sizes: Sizes) -> dict[str, Array]:
        """Run once. feeds fit the graph, as check_feeds found with these sizes. The caller owns what is returned.

        Both hold no resident tensors.
        """
        key = tuple(sizes.items())
        ready = self._own.get(key) or self._prepare(key, sizes)
        for name, staged in ready.inputs.items():
            np.copyto(staged, feeds[name], casting="no")
        if ready.graph is None:
            self._enqueue(ready)
        else:
            self._own.move_to_end(key)
            self._cuda.launch(ready.graph, self.stream)
        self._cuda.synchronize(self.stream)
        results = {name: staged.copy() for name, staged in ready.outputs.items()}
        if ready.graph is None and key in self._own:  # this run was the warm-up that a capture needs
            self._capture(key, ready)
        return results

    def close(self) -> None:
        """Give everything back in the order that CUDA asks for: work, graphs, contexts, memory, the stream."""
        with ExitStack() as stack:  # a call that fails must not keep the others from being made
            stack.callback(self._closing.close)
            stack.callback(self._release)
            stack.callback(setattr, self, "_shared", None)
            self._cuda.synchronize(self.stream)

    def _enqueue(self, ready: _Ready) -> None:
        layout, stream = ready.layout, self.stream
        self._cuda.copy_to_device(self._device, self._host, layout.inputs_end, stream)
        if not ready.context.execute_async_v3(stream):
            raise self._engine.error("the engine did not run")
        start = layout.outputs_start
        self._cuda.copy_to_host(self._host + start, self._device + start, layout.end - start, stream)

    def _prepare(self, key: Key, sizes: Sizes) -> _Ready:
        """A context set to that shape: its own where the shape comes for the third time, else the shared one."""
        layout = _Layout.of(self._engine.spec, sizes, self._resident)
        self._reserve(layout.end)
        profile = self._engine.profile(sizes)
        if self._captures:
            self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen.get(key, 0) >= REPEATS and key not in self._refused:
            while len(self._own) >= GRAPHS:
                self._forget(next(iter(self._own)))
            try:
                context = self._engine.context(self._workspace, of_one_shape=True)
                self._own[key] = self._set(context, layout, profile)
                return self._own[key]
            except BackendError as error:  # no memory for one more context, say: the shared one still works
                self._refuse(key, error)
        if self._last is None or self._last[0] != key:
            switch = None if profile == self._profile else profile
            self._last = self._profile = None  # unknown, should this fail
            self._last = key, self._set(self._shared, layout, switch)
            self._profile = profile
        return self._last[1]

    def _set(self, context: Any, layout: _Layout, profile: int | None) -> _Ready:
        """Give a context its profile (None: it has it), shapes and addresses, and hold its answer to the layout."""
        if profile is not None and not context.set_optimization_profile_async(profile, self.stream):
            raise self._engine.error(f"profile {profile} was refused")
        spec = self._engine.spec
        for tensor in spec.inputs:
            if not context.set_input_shape(tensor.name, layout.shapes[tensor.name]):
                raise self._engine.error(f"{tensor.name} of shape {list(layout.shapes[tensor.name])} was refused")
        addresses = {name: self._device + place for name, place in layout.places.items()}
        for name, address in {**addresses, **self._resident}.items():
            if not context.set_tensor_address(name, address):
                raise self._engine.error(f"the address of {name} was refused")
        for tensor in spec.outputs:
            given = tuple(context.get_tensor_shape(tensor.name))
            if given != layout.shapes[tensor.name]:
                wanted = list(layout.shapes[tensor.name])
                raise self._engine.error(f"the engine gives {tensor.name} as {list(given)}, the graph as {wanted}")
        return _Ready(context, layout, self._views(spec.inputs, layout), self._views(spec.outputs, layout))

    def _views(self, tensors: Iterable[TensorSpec], layout: _Layout) -> dict[str, Array]:
        """Those of the tensors that lie in the lane's memory, in host memory."""
        views = {}
        for tensor in tensors:
            if tensor.name in self._resident:
                continue
            shape, dtype = layout.shapes[tensor.name], np.dtype(tensor.dtype)
            memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(
                self._host + layout.places[tensor.name]
            )
            views[tensor.name] = np.ndarray(shape, dtype, buffer=np.ctypeslib.as_array(memory))
        return views

    def _capture(self, key: Key, ready: _Ready) -> None:
        asked = getattr(ready.context, "is_stream_capturable", None)
        try:
            if asked is not None and not asked(self.stream):
                raise self._engine.error("the engine can't be captured")
            ready.graph = self._cuda.capture(self.stream, lambda: self._enqueue(ready))
        except BackendError as error:
            self._forget(key)
            self._refuse(key, error)

    def _refuse(self, key: Key, error: BackendError) -> None:
        self._refused.add(key)
        self._engine.note_refused_graph(", ".join(f"{axis}={size}" for axis, size in key), error)

    def _forget(self, key: Key) -> None:
        """Let go of a shape's graph and context; it is as if it had never come."""
        ready = self._own.pop(key)
        del self._seen[key]
        if ready.graph is not None:
            self._cuda.destroy_graph(ready.graph)

    def _reserve(self, size: int) -> None:
        """Hold at least size bytes here and there. Where they move, all that knows the old addresses goes."""
        if size <= self._size:
            return
        doubled = min(max(size, 2 * self._size, _SMALLEST_BYTES), self._most)
        self._release()
        self._device = self._cuda.malloc(doubled)
        self._host = self._cuda.malloc_host(doubled)
        self._size = doubled

    def _release(self) -> None:
        self._last = None
        while self._own:
            self._forget(next(iter(self._own)))
        device, host = self._device, self._host
        self._size = self._device = self._host = 0
        with ExitStack() as stack:
            if host:
                stack.callback(self._cuda.free_host, host)
            if device:
                stack.callback(self._cuda.free, device)
