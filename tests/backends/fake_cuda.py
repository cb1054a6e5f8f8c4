"""A CUDA that holds an executor to the rules, and a TensorRT that computes from its memory.

Device memory is bytes behind made-up addresses, page-locked memory is real. Nothing that is put on a stream happens
before synchronize(), and what is still to be written holds garbage until then, so that results show a wrong address,
a copy that was not waited for, and memory that was reused too early. A broken rule is a Fault: an AssertionError,
which no product code catches. A failure that a device may really have is a BackendError, and is asked for by a test.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medcompile.backends._cuda import Device
from medcompile.errors import BackendError

GARBAGE = 0xA5
HOPPER = Device("Fake H100", (9, 0), 80 << 30, (13, 2))


class Fault(AssertionError):
    """Something that a real device would punish by a wrong result, a crash, or not at all until one day."""


@dataclass
class Work:
    """One thing on a stream: what it does, and the ranges of memory (address, size) that it reads and writes."""

    do: Callable[[], None]
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]


@dataclass
class Stream:
    queue: list[Work] = field(default_factory=list)
    capturing: list[Work] | None = None
    spoilt: str = ""
    thread: int = 0


class FakeCuda:
    """Implements Cuda. fail: the calls that shall fail, by name, each with the number of times."""

    def __init__(self, device: Device = HOPPER) -> None:
        self._device = device
        self._memory: dict[int, np.ndarray[Any, Any]] = {}
        self._host: dict[int, np.ndarray[Any, Any]] = {}
        self._gone: list[tuple[int, int]] = []
        self._streams: dict[int, Stream] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._next = 0x7000_0000_0000
        self._lock = threading.RLock()
        self.fail: dict[str, int] = {}
        self.calls: list[str] = []

    # ---- the interface

    def device(self) -> Device:
        return self._device

    def memory(self) -> tuple[int, int]:
        used = sum(array.size for array in self._memory.values())
        return self._device.memory_bytes - used, self._device.memory_bytes

    def malloc(self, size: int) -> int:
        with self._lock:
            self._called("malloc", forbidden_in_capture=True)
            address = self._new(size)
            self._memory[address] = np.full(size, GARBAGE, np.uint8)
            return address

    def free(self, address: int) -> None:
        with self._lock:
            self._called("free", forbidden_in_capture=True)
            self._let_go(self._memory, address)

    def malloc_host(self, size: int) -> int:
        with self._lock:
            self._called("malloc_host", forbidden_in_capture=True)
            array = np.full(size, GARBAGE, np.uint8)
            self._host[array.ctypes.data] = array
            return int(array.ctypes.data)

    def free_host(self, address: int) -> None:
        with self._lock:
            self._called("free_host", forbidden_in_capture=True)
            self._let_go(self._host, address)

    def create_stream(self) -> int:
        with self._lock:
            self._called("create_stream")
            handle = self._new(64)
            self._streams[handle] = Stream()
            return handle

    def destroy_stream(self, stream: int) -> None:
        with self._lock:
            self._called("destroy_stream")
            if self.stream(stream).queue:
                raise Fault("a stream is destroyed with work on it")
            del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        with self._lock:
            self._called("synchronize", forbidden_in_capture=True)
            found = self.stream(stream)
            work, found.queue = found.queue, []
        for item in work:
            item.do()

    def copy_to_device(self, device: int, host: int, size: int, stream: int) -> None:
        self._called("copy_to_device")

        def do() -> None:
            self.device_bytes(device, size)[:] = self.host_bytes(host, size)

        self.host_bytes(host, size)
        self.put(stream, Work(do, [(host, size)], [(device, size)]))

    def copy_to_host(self, host: int, device: int, size: int, stream: int) -> None:
        self._called("copy_to_host")

        def do() -> None:
            self.host_bytes(host, size)[:] = self.device_bytes(device, size)

        self.host_bytes(host, size)
        self.put(stream, Work(do, [(device, size)], [(host, size)]))

    def copy_on_device(self, to: int, source: int, size: int, stream: int) -> None:
        self._called("copy_on_device")

        def do() -> None:
            self.device_bytes(to, size)[:] = self.device_bytes(source, size)

        self.put(stream, Work(do, [(source, size)], [(to, size)]))

    def zero(self, device: int, size: int, stream: int) -> None:
        self._called("zero")
        self.put(stream, Work(lambda: self.device_bytes(device, size).fill(0), [], [(device, size)]))

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        self._called("capture", forbidden_in_capture=True)
        found = self.stream(stream)
        if found.queue:
            raise Fault("a capture begins with work on the stream that was not waited for")
        found.capturing, found.spoilt, found.thread = [], "", threading.get_ident()
        try:
            enqueue()
        finally:
            work, found.capturing = found.capturing, None
        if found.spoilt:
            raise BackendError(f"CUDA could not capture a stream: {found.spoilt}")
        with self._lock:
            handle = self._new(64)
            self._graphs[handle] = work
            return handle

    def launch(self, graph: int, stream: int) -> None:
        self._called("launch")
        if graph not in self._graphs:
            raise Fault(f"graph {graph:#x} is launched, and there is none")
        for work in self._graphs[graph]:
            self.put(stream, work)

    def destroy_graph(self, graph: int) -> None:
        with self._lock:
            self._called("destroy_graph")
            if graph not in self._graphs:
                raise Fault(f"graph {graph:#x} is destroyed, and there is none")
            del self._graphs[graph]

    # ---- what a fake library and a test ask

    def stream(self, handle: int) -> Stream:
        if handle not in self._streams:
            raise Fault(f"{handle:#x} is no stream")
        return self._streams[handle]

    def put(self, stream: int, work: Work) -> None:
        """Put work on a stream; what it will write is garbage from now on. Its memory must be there."""
        with self._lock:
            found = self.stream(stream)
            for address, size in (*work.reads, *work.writes):
                if address not in self._host and not self._in_host(address, size):
                    self.device_bytes(address, size)
            if found.capturing is not None:
                found.capturing.append(work)
                return
            self._check_others(stream, work)
            found.queue.append(work)
            for address, size in work.writes:
                if self._in_host(address, size):
                    self.host_bytes(address, size)[:] = GARBAGE

    def spoil(self, stream: int, reason: str) -> None:
        """Invalidate the capture of a stream, as a call does that may not be captured."""
        self.stream(stream).spoilt = reason

    def device_bytes(self, address: int, size: int) -> np.ndarray[Any, Any]:
        for start, array in self._memory.items():
            if start <= address < start + array.size:
                if address + size > start + array.size:
                    raise Fault(f"{size} bytes at {address:#x} reach {address + size - start - array.size} too far")
                return array[address - start : address - start + size]
        raise Fault(f"{address:#x} {'was freed' if self._was(address) else 'is no device memory'}")

    def host_bytes(self, address: int, size: int) -> np.ndarray[Any, Any]:
        for start, array in self._host.items():
            if start <= address < start + array.size:
                if address + size > start + array.size:
                    raise Fault(f"{size} host bytes at {address:#x} reach too far")
                return array[address - start : address - start + size]
        raise Fault(f"{address:#x} is no page-locked memory: a copy from it would wait")

    def left(self) -> dict[str, int]:
        """What was taken and not given back."""
        held = {"device": self._memory, "host": self._host, "streams": self._streams, "graphs": self._graphs}
        return {name: len(found) for name, found in held.items() if found}

    # ---- inside

    def _called(self, name: str, *, forbidden_in_capture: bool = False) -> None:
        self.calls.append(name)
        own = [s for s in self._streams.values() if s.capturing is not None and s.thread == threading.get_ident()]
        if forbidden_in_capture and own:
            raise Fault(f"{name} while a stream is captured")
        if self.fail.get(name):
            self.fail[name] -= 1
            raise BackendError(f"CUDA could not {name}: out of memory (fake)")

    def _new(self, size: int) -> int:
        address = self._next
        self._next += -(-size // 512) * 512 + 4096  # no two allocations touch
        return address

    def _let_go(self, where: dict[int, np.ndarray[Any, Any]], address: int) -> None:
        if address not in where:
            raise Fault(f"{address:#x} is freed {'twice' if self._was(address) else 'and was never taken'}")
        size = where[address].size
        for stream in self._streams.values():
            if any(_overlap((address, size), r) for w in stream.queue for r in (*w.reads, *w.writes)):
                raise Fault(f"{address:#x} is freed while work on a stream uses it")
        where[address][:] = GARBAGE
        del where[address]
        self._gone.append((address, size))

    def _was(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self._gone)

    def _in_host(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + a.size for start, a in self._host.items())

    def _check_others(self, stream: int, work: Work) -> None:
        """No other stream may have unfinished work on memory that this work writes, or write what it reads."""
        for handle, other in self._streams.items():
            for item in other.queue if handle != stream else ():
                pairs = [(w, r) for w in work.writes for r in (*item.reads, *item.writes)]
                pairs += [(r, w) for r in work.reads for w in item.writes]
                clash = [pair for pair in pairs if _overlap(*pair)]
                if clash:
                    raise Fault(f"two streams use {clash[0][0][0]:#x} at once")


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first[0] < second[0] + second[1] and second[0] < first[0] + first[1]


LIVING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every context of a fake engine that nobody has let go."""
