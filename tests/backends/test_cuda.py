"""CUDA where there is none: its words, and that the binding takes each call; and what the fake must see."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from medcompile.backends import _cuda
from medcompile.errors import BackendError, BackendUnavailable
from tests.backends.fake_cuda import FakeCuda, Fault


def test_without_cuda_python_or_without_a_device_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda.bindings", "cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable) as caught:
        _cuda.open_cuda()
    assert caught.value.fix == 'pip install "medcompile[rtx]"'


def test_each_call_of_the_real_cuda_has_arguments_that_the_binding_takes() -> None:
    """Without a driver every call comes back with an error of CUDA's, and a wrong argument would be a TypeError."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if not int(runtime.cudaGetDeviceCount()[0]):
        pytest.skip("there is a device: tests/gpu runs these calls")
    with pytest.raises(BackendUnavailable, match="there is no CUDA device"):
        _cuda.open_cuda()
    cuda = _cuda._Runtime(runtime)
    page = 4096
    calls: list[tuple[Any, ...]] = [
        (cuda.device,), (cuda.memory,), (cuda.malloc, 8), (cuda.free, page), (cuda.malloc_host, 8),
        (cuda.free_host, page), (cuda.create_stream,), (cuda.destroy_stream, page), (cuda.synchronize, page),
        (cuda.copy_to_device, page, page, 8, page), (cuda.copy_to_host, page, page, 8, page),
        (cuda.copy_on_device, page, page, 8, page), (cuda.zero, page, 8, page),
        (cuda.capture, page, lambda: None), (cuda.launch, page, page), (cuda.destroy_graph, page),
    ]  # fmt: skip
    assert {c[0].__name__ for c in calls} == {n for n in vars(_cuda.Cuda) if not n.startswith("_")}
    for call, *arguments in calls:
        with pytest.raises(BackendError, match=r"CUDA could not .*driver version is insufficient") as caught:
            call(*arguments)
        assert caught.value.fix


def test_the_fake_sees_use_after_free_double_free_overruns_and_what_was_not_waited_for() -> None:
    cuda = FakeCuda()
    device, host, stream = cuda.malloc(64), cuda.malloc_host(64), cuda.create_stream()
    cuda.host_bytes(host, 64)[:] = 7
    cuda.copy_to_device(device, host, 64, stream)
    assert cuda.device_bytes(device, 64)[0] != 7  # nothing happens before synchronize()
    with pytest.raises(Fault, match="while work on a stream uses it"):
        cuda.free(device)
    cuda.synchronize(stream)
    assert cuda.device_bytes(device, 64)[0] == 7
    with pytest.raises(Fault, match="too far"):
        cuda.copy_to_host(host, device + 32, 64, stream)
    with pytest.raises(Fault, match="malloc while a stream is captured"):
        cuda.capture(stream, lambda: cuda.malloc(8) and None)
    cuda.free(device)
    with pytest.raises(Fault, match="was freed"):
        cuda.copy_to_device(device, host, 8, stream)
    with pytest.raises(Fault, match="twice"):
        cuda.free(device)
