"""Engines and CUDA on a real device. Without one every test is skipped; none of them has run on a GPU yet."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import backends
from medcompile.backends import Executor, _cuda
from medcompile.backends._cuda import Cuda
from medcompile.backends._tensorrt_lane import REPEATS
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.run_onnx import session
from medcompile.spec import Axis, Profile, Variant
from tests import graphs

pytestmark = pytest.mark.gpu

Feeds = dict[str, np.ndarray[Any, Any]]
SPEC = dataclasses.replace(
    graphs.SPEC,
    profiles=(*graphs.SPEC.profiles, Profile("one", (Axis("batch", 1, 1, 1), Axis("sequence", 2, 8, 16)))),
)


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    try:
        return _cuda.open_cuda()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def load(target: str, variant: Variant, folder: Path) -> tuple[Executor, Path]:
    """The one-layer encoder of tests.graphs, built here for that target and loaded; and its typed graph."""
    backend = backends.for_target(target)
    try:
        here = backend.probe(target)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    source = graphs.write(variant, folder / "typed")
    out = folder / "artifact"
    out.mkdir()
    built = backend.build(source, SPEC, variant, here, out)
    return backend.load(out / built.file, SPEC, variant, built.target, None), source


def check(executor: Executor, source: Path, feeds: Feeds) -> None:
    """The device gives what ONNX Runtime gives for the same typed graph on the CPU, but for rounding (TF32, int8)."""
    wanted = session(source).run(["embedding"], feeds)[0]
    given = executor.run(feeds)["embedding"]
    assert given.shape == wanted.shape
    cosine = (given * wanted).sum(1) / np.linalg.norm(given, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.999
    assert np.abs(given - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def engine(request: pytest.FixtureRequest, cuda: Cuda, tmp_path: Path) -> Iterator[tuple[Executor, Path]]:
    executor, source = load(request.param, graphs.VARIANTS["fp32"], tmp_path)
    with executor:
        yield executor, source


def test_the_device_copies_both_ways_and_repeats_a_captured_copy(cuda: Cuda) -> None:
    size = 1 << 20
    device, host, stream = cuda.malloc(size), cuda.malloc_host(size), cuda.create_stream()
    bytes_ = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
    bytes_[:] = np.arange(size) % 251
    cuda.copy_to_device(device, host, size, stream)
    cuda.synchronize(stream)
    bytes_[:] = 0
    graph = cuda.capture(stream, lambda: cuda.copy_to_host(host, device, size, stream))
    cuda.synchronize(stream)
    assert not bytes_.any()  # captured, not run
    for _ in range(2):
        bytes_[:] = 0
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert np.array_equal(bytes_, np.arange(size) % 251)
    cuda.destroy_graph(graph)
    cuda.destroy_stream(stream)
    cuda.free(device)
    del bytes_
    cuda.free_host(host)


def test_a_failed_call_says_what_was_tried_and_leaves_the_device_usable(cuda: Cuda) -> None:
    with pytest.raises(BackendError, match=r"CUDA could not take .* MB of device memory: .*MB free"):
        cuda.malloc(1 << 50)
    cuda.free(cuda.malloc(1 << 20))


@pytest.mark.parametrize("variant", ["fp32", "static"])
@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "onnxruntime-rtx"])
def test_what_the_device_gives_equals_the_typed_graph_on_the_cpu(
    cuda: Cuda, target: str, variant: str, tmp_path: Path
) -> None:
    executor, source = load(target, graphs.VARIANTS[variant], tmp_path)
    with executor:
        for seed, (batch, sequence) in enumerate([(3, 16), (1, 2), (4, 32), (1, 16)]):
            check(executor, source, graphs.feeds(batch, sequence, seed))


def test_shapes_of_two_profiles_in_turn_give_right_results(engine: tuple[Executor, Path]) -> None:
    for seed, (batch, sequence) in enumerate([(1, 8), (4, 32), (1, 16), (2, 8), (1, 8)]):
        check(*engine, graphs.feeds(batch, sequence, seed))


def test_a_shape_that_keeps_coming_is_captured_and_its_graph_reads_new_inputs(
    engine: tuple[Executor, Path], caplog: pytest.LogCaptureFixture
) -> None:
    executor, source = engine
    with caplog.at_level(logging.WARNING, "medcompile"):
        for seed in range(REPEATS + 3):
            check(executor, source, graphs.feeds(2, 16, seed))
    assert not caplog.messages  # else: why no graph was captured
    lane = executor._idle[-1]  # type: ignore[attr-defined]
    assert [ready.graph is not None for ready in lane._own.values()] == [True]


def test_several_threads_get_what_each_would_get_alone(engine: tuple[Executor, Path]) -> None:
    executor, _ = engine
    cases = [graphs.feeds(1 + i % 4, 4 + 3 * i, seed=i) for i in range(6)]
    alone = [executor.run(case)["embedding"] for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        given = [executor.run(cases[index])["embedding"] for _ in range(20)]
        wrong.extend(index for each in given if not np.allclose(each, alone[index], atol=2e-2))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_executor_gives_its_device_memory_back(cuda: Cuda, tmp_path: Path) -> None:
    executor, _ = load("tensorrt-rtx", graphs.VARIANTS["fp32"], tmp_path)
    before = cuda.memory()[0]
    for _ in range(REPEATS + 1):
        executor.run(graphs.feeds(4, 32))
    executor.close()
    assert cuda.memory()[0] >= before
