"""Compiled kernels on a device: loaded once per CUDA context, launched as a step's plan says.

The driver comes in as a module (cuda.bindings.driver, or a test's fake), so that nothing here needs a GPU to be tested.

Run with a fake driver alone so far: no line of this has run on a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from typing import Any

from medcompile.errors import BackendError, BackendUnavailable
from medcompile.kernels.compiled import Entry, Kernels, Module
from medcompile.kernels.launches import Step

_STATIC_SHARED_BYTES = 48 << 10
"""Beyond this a kernel must be allowed its shared memory before it is launched."""
_KINDS = {"pointer": ctypes.c_void_p, "int32": ctypes.c_int32, "float32": ctypes.c_float}
_lock = threading.Lock()
_loaded: dict[tuple[int, str], tuple[Module, dict[str, Any]]] = {}


class Launcher:
    """One model's kernels. Loading, which compiles PTX, happens at the first launch in a context, for all launchers."""

    def __init__(self, kernels: Kernels, driver: Any = None) -> None:
        self._kernels = kernels
        self._digest = kernels.digest
        self._driver = driver

    def run(self, step: Step, values: Mapping[str, int | float], stream: int) -> None:
        """Put the step's launches on stream, in the current context; this returns before they are done.

        values: every argument that its kernels name. Raises BackendError where CUDA refuses.
        """
        module, functions = self._functions()
        for launch in step.launches:
            entry = module.entries[launch.kernel]
            self._launch(functions[launch.kernel], entry, launch.grid, values, stream)

    def _launch(
        self,
        function: Any,
        entry: Entry,
        grid: tuple[int, int, int],
        values: Mapping[str, int | float],
        stream: int,
    ) -> None:
        given = [values[name] for name, _ in entry.arguments] + [0] * entry.scratch
        kinds = [_KINDS[kind] for _, kind in entry.arguments] + [ctypes.c_void_p] * entry.scratch
        threads = 32 * entry.warps
        arguments = (tuple(given), tuple(kinds))
        answer = self._cuda.cuLaunchKernel(function, *grid, threads, 1, 1, entry.shared_bytes, stream, arguments, 0)
        self._call(f"launch {entry.name} in a grid of {' x '.join(map(str, grid))}", answer)

    def _functions(self) -> tuple[Module, Mapping[str, Any]]:
        """The module that suits the current device, and its loaded functions by kernel."""
        context = int(self._call("find the current context", self._cuda.cuCtxGetCurrent()))
        with _lock:
            if (context, self._digest) not in _loaded:
                _loaded[context, self._digest] = self._load()
            return _loaded[context, self._digest]

    def _load(self) -> tuple[Module, dict[str, Any]]:
        cuda = self._cuda
        device = self._call("find the current device", cuda.cuCtxGetDevice())
        kinds = cuda.CUdevice_attribute
        major, minor = (
            int(self._call("ask for the compute capability", cuda.cuDeviceGetAttribute(kind, device)))
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        module = self._kernels.module_for((major, minor))
        image = module.ptx.encode("ascii") + b"\0"
        loaded = self._call("compile the attention kernels", cuda.cuModuleLoadData(image))
        functions: dict[str, Any] = {}
        for kernel, entry in module.entries.items():
            name = entry.name.encode("ascii")
            functions[kernel] = self._call(f"find {entry.name}", cuda.cuModuleGetFunction(loaded, name))
            if entry.shared_bytes > _STATIC_SHARED_BYTES:
                most = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                answer = cuda.cuFuncSetAttribute(functions[kernel], most, entry.shared_bytes)
                self._call(f"give {entry.name} {entry.shared_bytes} bytes of shared memory", answer)
        return module, functions

    @property
    def _cuda(self) -> Any:
        if self._driver is None:
            try:
                from cuda.bindings import driver
            except ImportError as error:
                raise BackendUnavailable(
                    f"cuda-python cannot be imported: {error}", fix='pip install "medcompile[rtx]"'
                ) from error
            self._driver = driver
        return self._driver

    def _call(self, what: str, answer: tuple[Any, ...]) -> Any:
        """The value of a call's answer (status, value); None where it has none. Raises BackendError if it failed."""
        status, *value = answer
        if int(status):
            raise BackendError(
                f"CUDA could not {what}: {getattr(status, 'name', status)}",
                fix="nvidia-smi shows whether the GPU is well, and whether its driver knows CUDA 12.8 or later",
            )
        return value[0] if value else None
