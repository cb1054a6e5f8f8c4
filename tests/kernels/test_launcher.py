"""Launches as they reach the driver, which is a fake: what it is asked for, in which order, with which arguments."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

import pytest

from medcompile.errors import BackendError
from medcompile.kernels import launcher, launches, tensorrt_plugin
from medcompile.kernels.compiled import Kernels
from medcompile.kernels.launcher import Launcher

VALUES = {name: 0x1000 * (i + 1) for i, name in enumerate((*tensorrt_plugin.INPUTS, "out", "partial", "stats"))} | {
    "sequences": 3,
    "table_width": 9,
    "splits": 2,
    "window": 1 << 30,
    "scale": 0.25,
}


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_PTX = 218


class Names:
    """Stands for an enumeration: every name of it is itself."""

    def __getattr__(self, name: str) -> str:
        return name


class FakeDriver:
    """cuda.bindings.driver with one device, sm_89. launched: the arguments of each cuLaunchKernel."""

    CUdevice_attribute = Names()
    CUfunction_attribute = Names()

    def __init__(self, context: int = 7, load: Status = Status.CUDA_SUCCESS) -> None:
        self.context, self.load = context, load
        self.images: list[bytes] = []
        self.launched: list[tuple[Any, ...]] = []
        self.allowed: dict[str, int] = {}

    def cuCtxGetCurrent(self) -> tuple[Status, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, self.context

    def cuCtxGetDevice(self) -> tuple[Status, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, 0

    def cuDeviceGetAttribute(self, kind: str, device: int) -> tuple[Status, int]:  # noqa: N802
        assert device == 0
        return Status.CUDA_SUCCESS, 8 if kind.endswith("MAJOR") else 9

    def cuModuleLoadData(self, image: bytes) -> tuple[Status, str]:  # noqa: N802
        self.images.append(image)
        return self.load, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Status, str]:  # noqa: N802
        assert module == "module"
        return Status.CUDA_SUCCESS, name.decode()

    def cuFuncSetAttribute(self, function: str, kind: str, value: int) -> tuple[Status]:  # noqa: N802
        assert kind == "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        self.allowed[function] = value
        return (Status.CUDA_SUCCESS,)

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Status]:  # noqa: N802
        self.launched.append(arguments)
        return (Status.CUDA_SUCCESS,)


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_loaded", {})


def test_every_launch_gets_its_grid_its_threads_and_its_arguments_in_the_kernels_order(kernels: Kernels) -> None:
    step = launches.plan(kernels.face, tokens=3, sequences=3, table=64)
    assert [launch.kernel for launch in step.launches] == ["write", "splits", "reduce"]
    driver = FakeDriver()
    Launcher(kernels, driver).run(step, VALUES, stream=0xABC)
    for launch, asked in zip(step.launches, driver.launched, strict=True):
        entry = kernels.modules["sm_80"].entries[launch.kernel]
        function, *grid, threads, y, z, shared, stream, (given, kinds), extra = asked
        assert (function, tuple(grid), threads, y, z) == (entry.name, launch.grid, 32 * entry.warps, 1, 1)
        assert (shared, stream, extra) == (entry.shared_bytes, 0xABC, 0)
        names = [name for name, _ in entry.arguments]
        assert given == (*(VALUES[name] for name in names), *[0] * entry.scratch)
        wanted = {"scale": ctypes.c_float} | dict.fromkeys(
            ("sequences", "table_width", "window", "splits"), ctypes.c_int32
        )
        assert kinds == (*(wanted.get(name, ctypes.c_void_p) for name in names), *[ctypes.c_void_p] * entry.scratch)


def test_ptx_is_compiled_once_per_context_for_all_layers(kernels: Kernels) -> None:
    step = launches.plan(kernels.face, tokens=64, sequences=1, table=4)
    first, other = FakeDriver(), FakeDriver(context=8)
    for driver in (first, first, other):
        Launcher(kernels, driver).run(step, VALUES, stream=0)
    assert len(first.images) == len(other.images) == 1
    assert first.images[0] == kernels.modules["sm_80"].ptx.encode() + b"\0"
    assert len(first.launched) == 4


def test_a_kernel_that_needs_much_shared_memory_is_allowed_it_first(kernels: Kernels) -> None:
    entries = kernels.modules["sm_80"].entries
    large = {k: e.name for k, e in entries.items() if e.shared_bytes > 48 << 10}
    driver = FakeDriver()
    Launcher(kernels, driver).run(launches.plan(kernels.face, 64, 1, 4), VALUES, stream=0)
    assert set(driver.allowed) == set(large.values())


def test_ptx_that_the_driver_refuses_is_an_error_in_its_words(kernels: Kernels) -> None:
    driver = FakeDriver(load=Status.CUDA_ERROR_INVALID_PTX)
    with pytest.raises(BackendError, match="compile the attention kernels: CUDA_ERROR_INVALID_PTX"):
        Launcher(kernels, driver).run(launches.plan(kernels.face, 64, 1, 4), VALUES, stream=0)
