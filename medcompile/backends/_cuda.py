"""CUDA, as little of it as an executor needs: memory, copies each way and within, streams, captured graphs.

Cuda is what an executor is written against; open_cuda() gives the one over cuda-python, on the first visible device
(CUDA_VISIBLE_DEVICES chooses it), and tests give a fake. Every call is checked: a failure is a BackendError that
says what was tried and CUDA's own words. Addresses, streams and graphs are plain integers. TensorRT is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from medcompile.errors import BackendError, BackendUnavailable

INSTALL = 'pip install "medcompile[rtx]"'


@dataclass(frozen=True)
class Device:
    """One GPU. compute_capability: (9, 0) for Hopper. driver: the newest CUDA its driver knows, as (13, 0)."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    driver: tuple[int, int]

    @property
    def arch(self) -> str:
        """The word for it in spec.Target.arch: sm_90."""
        return "sm_{}{}".format(*self.compute_capability)


class Cuda(Protocol):
    """Sizes in bytes. Copies and launches return before they are done; synchronize() waits for all of a stream."""

    def device(self) -> Device: ...
    def memory(self) -> tuple[int, int]:
        """Free and total device memory."""
        ...

    def malloc(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def malloc_host(self, size: int) -> int:
        """Page-locked host memory, which the device copies from and to by itself."""
        ...

    def free_host(self, address: int) -> None: ...
    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...
    def copy_to_device(self, device: int, host: int, size: int, stream: int) -> None: ...
    def copy_to_host(self, host: int, device: int, size: int, stream: int) -> None: ...
    def copy_on_device(self, to: int, source: int, size: int, stream: int) -> None: ...
    def zero(self, device: int, size: int, stream: int) -> None: ...
    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Record what enqueue puts on stream, without running it, as a graph that launch() repeats.

        Whatever enqueue raises comes through; the stream is out of capture either way.
        """
        ...

    def launch(self, graph: int, stream: int) -> None: ...
    def destroy_graph(self, graph: int) -> None: ...


def open_cuda() -> Cuda:
    """CUDA on this machine. Raises BackendUnavailable where cuda-python, a driver or a device is missing."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendUnavailable(f"cuda-python cannot be imported: {error}", fix=INSTALL) from error
    status, count = runtime.cudaGetDeviceCount()
    if int(status) or not count:
        reason = _words(runtime, status) if int(status) else "no device is visible"
        raise BackendUnavailable(
            f"there is no CUDA device to run on: {reason}",
            fix="run on a machine with an NVIDIA GPU and a driver for CUDA "
            f"{_version(runtime.cudaRuntimeGetVersion()[1])[0]} or later (nvidia-smi shows both)",
        )
    return _Runtime(runtime)


class _Runtime:
    """Cuda over cuda.bindings.runtime. Not yet run on a device: without one, each call was seen to reach the driver."""

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime

    def device(self) -> Device:
        found = self._call("read the device", self._cuda.cudaGetDeviceProperties(0))
        driver = self._call("ask for the driver's version", self._cuda.cudaDriverGetVersion())
        name = found.name.decode().rstrip("\0")
        return Device(name, (found.major, found.minor), int(found.totalGlobalMem), _version(driver))

    def memory(self) -> tuple[int, int]:
        status, free, total = self._cuda.cudaMemGetInfo()
        self._call("ask for free memory", (status,))
        return int(free), int(total)

    def malloc(self, size: int) -> int:
        what = f"take {size / 1e6:.1f} MB of device memory"
        return int(self._call(what, self._cuda.cudaMalloc(size)))

    def free(self, address: int) -> None:
        self._call("free device memory", self._cuda.cudaFree(address))

    def malloc_host(self, size: int) -> int:
        what = f"take {size / 1e6:.1f} MB of page-locked host memory"
        return int(self._call(what, self._cuda.cudaHostAlloc(size, self._cuda.cudaHostAllocDefault)))

    def free_host(self, address: int) -> None:
        self._call("free page-locked host memory", self._cuda.cudaFreeHost(address))

    def create_stream(self) -> int:
        flags = self._cuda.cudaStreamNonBlocking
        return int(self._call("create a stream", self._cuda.cudaStreamCreateWithFlags(flags)))

    def destroy_stream(self, stream: int) -> None:
        self._call("destroy a stream", self._cuda.cudaStreamDestroy(stream))

    def synchronize(self, stream: int) -> None:
        self._call("finish the work on a stream", self._cuda.cudaStreamSynchronize(stream))

    def copy_to_device(self, device: int, host: int, size: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("copy to the device", self._cuda.cudaMemcpyAsync(device, host, size, kind, stream))

    def copy_to_host(self, host: int, device: int, size: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("copy from the device", self._cuda.cudaMemcpyAsync(host, device, size, kind, stream))

    def copy_on_device(self, to: int, source: int, size: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("copy on the device", self._cuda.cudaMemcpyAsync(to, source, size, kind, stream))

    def zero(self, device: int, size: int, stream: int) -> None:
        self._call("fill device memory", self._cuda.cudaMemsetAsync(device, 0, size, stream))

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        # Thread-local: what other threads do meanwhile (another lane's allocation, say) must not spoil the capture.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("begin to capture a stream", self._cuda.cudaStreamBeginCapture(stream, mode))
        try:
            enqueue()
        except BaseException:
            status, graph = self._cuda.cudaStreamEndCapture(stream)
            if not int(status):
                self._cuda.cudaGraphDestroy(graph)
            self._cuda.cudaGetLastError()  # a spoilt capture is this call's failure, not the next one's
            raise
        graph = self._call("capture a stream", self._cuda.cudaStreamEndCapture(stream))
        try:
            return int(self._call("make a graph ready", self._cuda.cudaGraphInstantiate(graph, 0)))
        finally:
            self._call("let a captured graph go", self._cuda.cudaGraphDestroy(graph))

    def launch(self, graph: int, stream: int) -> None:
        self._call("launch a graph", self._cuda.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("destroy a graph", self._cuda.cudaGraphExecDestroy(graph))

    def _call(self, what: str, answer: tuple[Any, ...]) -> Any:
        """The value of a call's answer (status, value); None where it has none. Raises BackendError if it failed."""
        status, *value = answer
        if int(status):
            self._cuda.cudaGetLastError()
            if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
                free, total = self.memory()
                room = f"; the device has {free / 1e6:.1f} of {total / 1e6:.1f} MB free"
                fix = "close other programs on the GPU, or rebuild with smaller shapes in the recipe"
            else:
                room, fix = "", "nvidia-smi shows whether the GPU is well; a fault of a program ends with its process"
            raise BackendError(f"CUDA could not {what}: {_words(self._cuda, status)}{room}", fix=fix)
        return value[0] if value else None


def _words(runtime: Any, status: Any) -> str:
    return f"{runtime.cudaGetErrorString(status)[1].decode()} ({status.name})"


def _version(packed: int) -> tuple[int, int]:
    """CUDA packs 13.2 as 13020."""
    return packed // 1000, packed % 1000 // 10
