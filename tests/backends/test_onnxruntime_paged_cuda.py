"""Decoders for ONNX Runtime's CUDA provider, as far as a machine without a GPU can tell: the graph, and the step model
over a fake session that computes from the memory of a fake CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from medcompile.backends import _cuda
from medcompile.backends import onnxruntime as backend
from medcompile.backends._onnxruntime_paged_cuda import BLOCK_SIZE, OnnxRuntimeCudaStepModel
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.spec import Precision, Target, Variant
from tests import decoders
from tests.backends.fake_cuda import FakeCuda, Fault
from tests.backends.small_decoder import HEAD_DIM, INTEGERS, KV_HEADS, POOLS, VOCABULARY, alone, batch, decode
from tests.kernels import decoders as graphs

Array = np.ndarray[Any, Any]
CUDA = Target("onnxruntime-cuda", "onnxruntime", "cuda", "sm_90", "linux", "1")
FP16 = Variant("fp16", float_dtype=Precision.FLOAT16)


class FakeSession:
    """The library's session and its binding in one. Its pools hold a token's heads side by side."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.fails = False
        self.bound: dict[str, Any] = {}

    def get_inputs(self) -> list[Any]:
        pools = [SimpleNamespace(name=name, type="tensor(float16)", shape=POOL) for name in POOLS]
        return [*(SimpleNamespace(name=t.name, type="", shape=list(t.shape)) for t in INTEGERS), *pools]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits", shape=["rows", VOCABULARY])]

    def io_binding(self) -> FakeSession:
        return self

    def bind_input(self, name: str, device: str, number: int, kind: int, shape: tuple[int, ...], at: int) -> None:
        assert (device, number, kind) == ("cuda", 0, onnx.TensorProto.FLOAT16)
        raw = self.cuda.device_bytes(at, 2 * int(np.prod(shape)))
        self.bound[name] = raw.view(np.float16).reshape(shape).swapaxes(1, 2)

    def bind_cpu_input(self, name: str, array: Array) -> None:
        assert array.dtype.name == next(t.dtype for t in INTEGERS if t.name == name)
        self.bound[name] = array

    def bind_output(self, name: str, device: str, number: int, kind: type, shape: tuple[int, ...], at: int) -> None:
        assert (name, device, kind) == ("logits", "cpu", np.float32)
        self.bound[name] = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(shape))).from_address(at)).reshape(shape)

    def run_with_iobinding(self, binding: FakeSession) -> None:
        if any(stream.queue for stream in self.cuda._streams.values()):
            raise Fault("the library runs beside work on the pools that was not waited for")
        if self.fails:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered\nat cuda_call.cc")
        feeds = {name: value for name, value in binding.bound.items() if name != "logits"}
        binding.bound["logits"][...] = decode(feeds)["logits"]


POOL = ["blocks", "block_size", KV_HEADS, HEAD_DIM]


@pytest.fixture
def session() -> Iterator[FakeSession]:
    cuda = FakeCuda()
    yield FakeSession(cuda)
    assert cuda.left() == {}


def load(session: FakeSession, blocks: int = 16) -> Any:
    return OnnxRuntimeCudaStepModel(session, session.cuda, blocks=blocks)  # type: ignore[arg-type]


# ---- steps


def test_ragged_chunks_give_every_token_the_logits_of_its_whole_sequence(session: FakeSession) -> None:
    model = load(session)
    assert (model.blocks, model.block_size, model.vocabulary) == (16, BLOCK_SIZE, VOCABULARY)
    assert model.pool_bytes == len(POOLS) * 16 * BLOCK_SIZE * KV_HEADS * HEAD_DIM * 2
    texts = [np.arange(n) % VOCABULARY for n in (1, 60, 33, 12)]
    for ids, logits in zip(texts, decoders.chunked_logits(model, texts), strict=True):
        wanted = alone(batch([0], [len(ids)], rows=list(range(len(ids)))))
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    assert session.cuda.calls.count("malloc") == session.cuda.calls.count("zero") == len(POOLS)
    assert "copy_to_device" not in session.cuda.calls  # the library copies what is small
    model.close()


def test_a_copied_block_serves_the_next_step(session: FakeSession) -> None:
    model = load(session)
    model.step(batch([0], [20]))
    wanted = model.step(batch([20], [1]))
    model.copy_blocks([(0, 7), (1, 8)])
    np.testing.assert_array_equal(model.step(batch([20], [1], first_block=7)), wanted)
    assert np.abs(model.step(batch([20], [1], first_block=10)) - wanted).max() > 1e-3  # else nothing was told
    assert model.step(batch([21], [1], rows=[])).shape == (0, VOCABULARY)
    model.close()


@pytest.mark.parametrize("how", ["run", "copy_on_device"])
def test_a_model_that_failed_gives_all_back_and_runs_no_more(session: FakeSession, how: str) -> None:
    model = load(session)
    session.fails = how == "run"
    session.cuda.fail["copy_on_device"] = how == "copy_on_device"
    with pytest.raises(BackendError, match=r"700: an illegal memory access was encountered$|out of memory"):
        model.copy_blocks([(0, 1)])
        model.step(batch([0], [5]))
    assert session.cuda.left() == {}
    with pytest.raises(BackendError, match="closed"):
        model.step(batch([0], [5]))
    model.close()


@pytest.mark.parametrize("call", ["create_stream", "malloc", "zero", "synchronize"])
def test_a_failure_while_loading_leaves_nothing(session: FakeSession, call: str) -> None:
    session.cuda.fail[call] = 1
    with pytest.raises(BackendError, match=call):
        load(session)
    assert session.cuda.left() == {}


# ---- builds


def build(variant: Variant, target: Target, folder: Path, dtype: str = "FLOAT16") -> Any:
    typed, out = folder / "typed", folder / "out"
    typed.mkdir()
    out.mkdir()
    spec = graphs.write(typed / "generate.onnx", dtype=dtype)
    return backend.BACKEND.build(typed / "generate.onnx", spec, variant, target, out)


def test_the_artifact_holds_the_librarys_own_operator_and_is_tried_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[Path, int]] = []

    def load_decoder(path: Path, variant: Variant, threads: int | None, blocks: int) -> Any:
        tried.append((path, blocks))
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(backend.BACKEND, "load_decoder", load_decoder)
    built = build(FP16, CUDA, tmp_path)
    assert tried == [(tmp_path / "out" / built.file, 1)]
    assert built.notes == ("fused: 2 PagedAttention",)
    nodes = onnx.load(tmp_path / "out" / built.file).graph.node
    assert [n.domain for n in nodes if n.op_type == "PagedAttention"] == ["com.microsoft"] * 2


def test_float32_and_the_provider_without_the_operator_are_refused_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="in 16 bits only") as caught:
        (tmp_path / "a").mkdir()
        build(Variant("fp32"), CUDA, tmp_path / "a", "FLOAT")
    assert "float: float16 or bfloat16" in caught.value.fix
    rtx = Target("onnxruntime-rtx", "onnxruntime", "cuda", "sm_90", "linux", "1")
    with pytest.raises(BackendError, match="NvTensorRTRTXExecutionProvider has no paged attention") as caught:
        (tmp_path / "b").mkdir()
        build(FP16, rtx, tmp_path / "b")
    assert caught.value.fix == "leave out target onnxruntime-rtx"


def test_without_the_provider_or_a_device_nothing_is_built_or_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(BackendUnavailable, match="has no CUDAExecutionProvider"):
        backend.BACKEND.probe("onnxruntime-cuda")
    monkeypatch.setattr(_cuda, "open_cuda", FakeCuda)
    with pytest.warns(UserWarning, match="Specified provider"), pytest.raises(BackendError, match="PagedAttention"):
        build(FP16, CUDA, tmp_path)
