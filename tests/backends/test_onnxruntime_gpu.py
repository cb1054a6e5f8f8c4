"""ONNX Runtime's GPU targets, as far as a machine without a GPU can tell: every way in which they must refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest

from medcompile.backends import _cuda
from medcompile.backends import onnxruntime as backend
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.spec import Axis, Profile, Target
from tests import graphs
from tests.backends.fake_cuda import FakeCuda

TARGETS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-rtx": "NvTensorRTRTXExecutionProvider"}
BACKEND = backend.BACKEND
CUDA = Target("onnxruntime-cuda", "onnxruntime", "cuda", "sm_90", "linux", "1")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both providers are listed, as onnxruntime-gpu lists them on a machine that can't run them."""
    there = [*TARGETS.values(), "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)


@pytest.mark.parametrize("target", TARGETS)
def test_an_onnxruntime_without_the_provider_is_unavailable_with_the_package_that_has_it(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match=f"has no {TARGETS[target]}; it has CPUExecutionProvider") as caught:
        BACKEND.probe(target)
    assert "pip install" in caught.value.fix


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("listed")
def test_a_listed_provider_without_a_device_is_unavailable(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> FakeCuda:
        raise BackendUnavailable("there is no CUDA device to run on", fix="run on a machine with one")

    monkeypatch.setattr(_cuda, "open_cuda", none)
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        BACKEND.probe(target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("listed")
def test_a_provider_and_a_device_make_a_target_of_that_device(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "open_cuda", FakeCuda)
    found = BACKEND.probe(target)
    assert (found.name, found.device, found.arch) == (target, "cuda", "sm_90")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_to_the_cpu_is_an_error_and_never_runs(target: str, tmp_path: Path) -> None:
    if TARGETS[target] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    source = graphs.write(graphs.VARIANTS["fp32"], tmp_path)
    with pytest.raises(BackendError, match=f"placed on CPUExecutionProvider, not on {TARGETS[target]}") as caught:
        BACKEND.load(
            source, graphs.SPEC, graphs.VARIANTS["fp32"], dataclasses.replace(CUDA, name=target, arch="sm_90"), None
        )
    assert caught.value.fix


def test_a_provider_that_leaves_matrix_products_to_the_cpu_is_an_error_that_names_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = graphs.write(graphs.VARIANTS["fp32"], tmp_path)
    real = onnxruntime.InferenceSession

    class Listed(real):  # type: ignore[misc, valid-type]
        """Says that it has the provider, and has placed every node on the CPU."""

        def __init__(self, path: str, options: Any, providers: list[Any], **rest: Any) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"])
            self._named = [p if isinstance(p, str) else p[0] for p in providers]

        def get_providers(self) -> list[str]:
            return self._named

    monkeypatch.setattr(onnxruntime, "InferenceSession", Listed)
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider leaves 8 matrix products of embed to the CPU, \S+"):
        BACKEND.load(source, graphs.SPEC, graphs.VARIANTS["fp32"], CUDA, None)


def test_the_artifact_for_a_gpu_is_the_typed_graph_without_fused_operators_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(
        BACKEND, "load", lambda path, *rest: tried.append(path) or SimpleNamespace(close=lambda: None), raising=True
    )
    source = graphs.write(graphs.VARIANTS["static"], tmp_path / "typed")
    out = tmp_path / "out"
    out.mkdir()
    built = BACKEND.build(source, graphs.SPEC, graphs.VARIANTS["static"], CUDA, out)
    assert tried == [out / built.file]
    typed, copied = onnx.load(source), onnx.load(out / built.file)
    assert [n.op_type for n in copied.graph.node] == [n.op_type for n in typed.graph.node]
    assert {n.domain for n in copied.graph.node} <= {"", "ai.onnx"}


def test_the_rtx_provider_is_told_the_range_over_all_profiles() -> None:
    other = Profile("long", (Axis("batch", 2, 3, 3), Axis("sequence", 1, 30, 64)))
    spec = dataclasses.replace(graphs.SPEC, inputs=graphs.SPEC.inputs[:2], profiles=(*graphs.SPEC.profiles, other))
    assert backend._profile_options(spec) == {
        "nv_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "nv_profile_opt_shapes": "input_ids:3x30,attention_mask:3x30",
        "nv_profile_max_shapes": "input_ids:4x64,attention_mask:4x64",
    }
