"""Engines built for real where TensorRT-RTX is installed (no GPU is needed), and plans that don't fit a machine."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from medcompile import onnx_files
from medcompile.backends import Built, _tensorrt_executor, _tensorrt_report, tensorrt
from medcompile.backends._cuda import Device
from medcompile.errors import BackendError, BackendUnavailable, ProfileError, UsageError
from medcompile.passes.cast import Cast
from medcompile.program import Context, Graph, Program, Silent
from medcompile.spec import Axis, LayerRule, Precision, Profile, Stage, Target, Variant
from tests import graphs

BACKEND = tensorrt.BACKEND
INT8 = graphs.VARIANTS["static"]


@pytest.fixture
def target() -> Target:
    """This machine as a target for TensorRT-RTX, as if it had no GPU."""
    pytest.importorskip("tensorrt_rtx", reason='pip install "medcompile[rtx]"')
    return dataclasses.replace(BACKEND.probe("tensorrt-rtx"), arch="none")


def _build(
    target: Target, folder: Path, variant: Variant = INT8, edit: Callable[[ir.Model], None] | None = None, **spec: Any
) -> tuple[Built, Path]:
    """The typed graph of the variant, edited, built. **spec: fields of the graph's face to replace."""
    graph = Graph(graphs.SPEC, graphs.typed(variant))
    program = Program("bert", {graph.name: graph}, Stage.QUANTIZED)
    model = Cast(variant.float_dtype)(program, Context(folder, Silent())).graphs[graph.name].model
    if edit is not None:
        edit(model)
    (folder / "typed").mkdir()
    onnx_files.save({graph.name: model}, folder / "typed")
    source = folder / "typed" / f"{graph.name}.onnx"
    out = folder / "artifact"
    out.mkdir()
    return BACKEND.build(source, dataclasses.replace(graphs.SPEC, **spec), variant, target, out), out


# ---- engines


def test_an_int8_engine_computes_every_linear_layer_in_int8_and_says_so_in_its_layer_table(
    target: Target, tmp_path: Path
) -> None:
    built, out = _build(target, tmp_path)
    assert built.notes == ("linear layers: 6 int8 x int8", "built without a GPU")
    assert (built.target.arch, built.target.device, built.target.present) == ("sm_80+", "cuda", True)
    table = json.loads((out / "layers.json").read_text())
    assert set(table["products"].values()) == {"int8 x int8"}
    assert len(table["products"]) == 6
    assert table["plan"]["size_bytes"] == (out / built.file).stat().st_size
    merged = [row for row in table["layers"] if "attention.query/MatMul" in row["nodes"] and row["kind"] == "gemm"]
    assert merged[0]["weights"][0] == f"int8 [{graphs.HIDDEN}, {3 * graphs.HIDDEN}]"


@pytest.mark.parametrize(
    ("variant", "products"),
    [
        (Variant("fp16", float_dtype=Precision.FLOAT16), "6 float16 x float16"),
        (Variant("bf16", float_dtype=Precision.BFLOAT16), "6 bfloat16 x bfloat16"),
        (dataclasses.replace(INT8, name="int8-fp16", float_dtype=Precision.FLOAT16), "6 int8 x int8"),
        (
            Variant("int4", float_dtype=Precision.FLOAT16, weights=Precision.INT4, block_size=16),
            "6 float16 x int4",
        ),
        (
            Variant("fp8", float_dtype=Precision.FLOAT16, weights=Precision.FLOAT8, activations=Precision.FLOAT8),
            "6 float8 x float8",
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_precision_of_the_graph_is_the_engines(
    target: Target, tmp_path: Path, variant: Variant, products: str
) -> None:
    built, out = _build(target, tmp_path, variant)
    assert built.notes[0] == f"linear layers: {products}"
    oldest = built.target.arch.removeprefix("sm_").removesuffix("+")
    assert f"accelerators={{sm{oldest} }}".encode() in (out / built.file).read_bytes()


def test_a_mixed_engine_computes_each_linear_layer_as_its_rule_says(target: Target, tmp_path: Path) -> None:
    rules = (LayerRule("attention.value"), LayerRule("intermediate", Precision.INT4, block_size=16))
    variant = dataclasses.replace(INT8, name="mixed", float_dtype=Precision.FLOAT16, layers=rules)
    built, out = _build(target, tmp_path, variant)
    assert built.notes[0] == "linear layers: 1 float16 x float16, 1 float16 x int4, 4 int8 x int8"
    products = json.loads((out / "layers.json").read_text())["products"]
    assert products["attention.value/MatMul"] == "float16 x float16"
    assert products["intermediate/MatMul"] == "float16 x int4"


def test_fresh_builds_repeat_their_bytes_and_never_differ_in_layers_or_size(target: Target, tmp_path: Path) -> None:
    """TensorRT-RTX numbers some temporaries by chance (docs/tensorrt.md), so equal plans may need more builds."""
    plans: list[bytes] = []
    rows = []
    while len(set(plans)) == len(plans) and len(plans) < 4:
        folder = tmp_path / str(len(plans))
        folder.mkdir()
        out = _build(target, folder)[1]
        plans.append((out / "engine.plan").read_bytes())
        rows.append(json.loads((out / "layers.json").read_text())["layers"])
    assert len(set(plans)) < len(plans)
    assert {len(plan) for plan in plans} == {len(plans[0])}
    assert all(row == rows[0] for row in rows)


def test_all_profiles_and_settings_reach_the_engine(
    target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medcompile")
    short = Profile("short", (Axis("batch", 1, 1, 1), Axis("sequence", 2, 8, 8)))
    compute = {"compute_capability": "89,80", "workspace_mb": 256, "streams": 2}
    variant = dataclasses.replace(INT8, compute=compute)
    built, out = _build(target, tmp_path, variant, profiles=(*graphs.SPEC.profiles, short))
    bindings = json.loads((out / "layers.json").read_text())["bindings"]
    assert [b["name"] for b in bindings] == [*graphs.INPUTS, "embedding"]
    assert bindings[0]["profiles"] == [[[1, 2], [2, 16], [4, 32]], [[1, 2], [1, 8], [1, 8]]]
    assert built.target.arch == "sm_80,sm_89"
    assert "TensorRT has no use for compute streams=2" in built.notes
    assert any("Subgraph compilation completed" in r.message for r in caplog.records)


def test_float32_means_float32_unless_the_variant_lets_products_drop_bits(target: Target, tmp_path: Path) -> None:
    plans = []
    for name, tf32 in (("exact", False), ("tf32", True), ("unsaid", None)):
        (tmp_path / name).mkdir()
        variant = Variant("fp32", compute={} if tf32 is None else {"tf32": tf32})
        plans.append((_build(target, tmp_path / name, variant)[1] / "engine.plan").read_bytes())
    assert plans[0] == plans[2]
    assert plans[0] != plans[1]


def test_no_linear_layer_in_int8_where_the_graph_has_some_is_a_failed_build(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is told to build the float graph, and the check is given the int8 one."""
    wanted = _tensorrt_report.products(graphs.typed(INT8))
    monkeypatch.setattr(_tensorrt_report, "products", lambda model: wanted)
    with pytest.raises(BackendError) as caught:
        _build(target, tmp_path, graphs.VARIANTS["fp32"])
    assert "6 of 6 linear layers don't compute in their integers" in str(caught.value)
    assert "attention.query/MatMul: float32 x float32, not int8 x int8" in str(caught.value)


# ---- refusals


def test_an_asymmetric_zero_point_names_the_node_and_the_setting(target: Target, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"QuantizeLinear embeddings\.LayerNorm.* has a zero point") as caught:
        _build(target, tmp_path, graphs.VARIANTS["asymmetric"])
    assert "symmetric: true in variants.asymmetric" in caught.value.fix


def test_rounding_at_run_time_is_refused_before_anything_is_built(target: Target, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="rounds activations at run time") as caught:
        _build(target, tmp_path, graphs.VARIANTS["dynamic"])
    assert "dynamic: true in variants.dynamic" in caught.value.fix
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(BackendError, match=r"run time \(attention\.value/MatMul/integer\)"):
        _build(target, tmp_path, graphs.VARIANTS["mixed"])


def test_an_operator_that_the_parser_lacks_is_named_with_its_node(target: Target, tmp_path: Path) -> None:
    def edit(model: ir.Model) -> None:
        next(node for node in model.graph if node.op_type == "Gelu").op_type = "Mish2"

    with pytest.raises(BackendError, match=r"operator Mish2 is unknown to it \(node intermediate/Gelu\)") as caught:
        _build(target, tmp_path, edit=edit)
    assert "without Mish2" in caught.value.fix
    if find_spec("polygraphy"):
        assert "56 of 57 nodes, in 2 parts; not intermediate/Gelu (Mish2)" in caught.value.message


def test_an_axis_without_a_range_is_a_profile_error(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="profile default has no axis 'sequence'"):
        _build(target, tmp_path, profiles=(Profile("default", (Axis("batch", 1, 2, 4),)),))


def test_weights_that_are_gone_are_a_backend_error(target: Target, tmp_path: Path) -> None:
    source = graphs.write(INT8, tmp_path / "typed")
    (source.parent / "weights.bin").write_bytes(b"")
    with pytest.raises((BackendError, OSError)):
        BACKEND.build(source, graphs.SPEC, INT8, target, tmp_path)


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        ({"workspace_mbb": 1}, "compute.workspace_mbb is unknown"),
        ({"workspace_mb": "much"}, "compute.workspace_mb is 'much'"),
        ({"tf32": "no"}, "compute.tf32 is 'no'"),
        ({"compute_capability": "8.9"}, "compute.compute_capability is '8.9'"),
    ],
)
def test_a_wrong_setting_is_a_usage_error_that_says_what_is_right(
    target: Target, tmp_path: Path, compute: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        _build(target, tmp_path, dataclasses.replace(INT8, compute=compute))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        ({"compute_capability": 90}, r"builds for compute_capability \[75, 80, 86, 89, 120, 121\], not for \[90\]"),
        ({"version_compatible": True}, "refuses graph embed"),
    ],
)
def test_what_the_library_cannot_do_is_said_in_its_own_words(
    target: Target, tmp_path: Path, compute: dict[str, Any], words: str
) -> None:
    with pytest.raises(BackendError, match=words):
        _build(target, tmp_path, dataclasses.replace(INT8, compute=compute))


# ---- does a plan fit?


def _gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """Let this machine have a GPU of that compute capability, or none."""

    def device() -> Device:
        if capability is None:
            raise BackendUnavailable("there is no CUDA device to run on", fix="run where there is one")
        return Device("A GPU", capability, 8 << 30, (13, 0))

    monkeypatch.setattr(tensorrt, "_device", device)


def _library(monkeypatch: pytest.MonkeyPatch, flags: int = 0, validity: str = "VALID", version: str = "1.7.1") -> None:
    """A library that finds every plan as said."""
    kinds = {name: 1 << i for i, name in enumerate(tensorrt._DIAGNOSES)}
    fake = SimpleNamespace(
        __version__=version,
        Runtime=lambda log: SimpleNamespace(get_engine_validity=lambda plan: (SimpleNamespace(name=validity), flags)),
        EngineInvalidityDiagnostics=SimpleNamespace(__members__=kinds),
    )
    monkeypatch.setattr(tensorrt, "_module", lambda library: fake)
    monkeypatch.setattr(_tensorrt_executor, "logger_of", lambda library: SimpleNamespace(said=lambda: "no reason"))


def _plan(folder: Path) -> Path:
    (folder / "engine.plan").write_bytes(b"0123456789")
    (folder / "layers.json").write_text(json.dumps({"plan": {"size_bytes": 10}}))
    return folder / "engine.plan"


BUILT = Target("tensorrt-rtx", "tensorrt", "cuda", "sm_80+", tensorrt._system(), "1.7.1")


def _load(path: Path, target: Target = BUILT) -> Any:
    return BACKEND.load(path, graphs.SPEC, INT8, target, None)


def test_a_plan_that_fits_is_handed_to_the_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _library(monkeypatch)
    _gpu(monkeypatch, (8, 9))
    loaded: list[Any] = []
    monkeypatch.setattr(_tensorrt_executor, "load_engine", lambda *arguments: loaded.append(arguments))
    path = _plan(tmp_path)
    _load(path)
    assert loaded[0][:2] == (path, graphs.SPEC)


def test_a_plan_of_another_version_says_both_and_how_to_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _library(monkeypatch, version="1.8.0")
    _gpu(monkeypatch, (8, 9))
    with pytest.raises(BackendUnavailable) as caught:
        _load(_plan(tmp_path))
    words = "built by TensorRT-RTX 1.7.1 for compute capability 8.0 and later; this machine has TensorRT-RTX 1.8.0"
    assert caught.value.message == words
    assert caught.value.fix == "rebuild with: medcompile build --from <bundle> --targets tensorrt-rtx"


def test_a_plan_of_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _library(monkeypatch)
    with pytest.raises(BackendUnavailable, match="on windows-amd64, and this machine is linux"):
        _load(_plan(tmp_path), dataclasses.replace(BUILT, os="windows-amd64"))


@pytest.mark.parametrize(("arch", "capability"), [("sm_80+", (7, 5)), ("sm_89,sm_120", (8, 6)), ("sm_120", (9, 0))])
def test_a_gpu_that_is_too_old_is_named(
    arch: str, capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _library(monkeypatch)
    _gpu(monkeypatch, capability)
    with pytest.raises(BackendUnavailable) as caught:
        _load(_plan(tmp_path), dataclasses.replace(BUILT, arch=arch))
    assert f"this machine has compute capability {capability[0]}.{capability[1]} (A GPU)" in caught.value.message


@pytest.mark.parametrize("name", tensorrt._DIAGNOSES)
def test_every_diagnosis_of_the_library_is_put_in_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _library(monkeypatch, 1 << list(tensorrt._DIAGNOSES).index(name), "INVALID")
    _gpu(monkeypatch, (8, 9))
    with pytest.raises(BackendError, match=tensorrt._DIAGNOSES[name]) as caught:
        _load(_plan(tmp_path))
    assert caught.value.fix
    assert isinstance(caught.value, BackendUnavailable) == (name != "MALFORMED_ENGINE")


def test_a_cut_plan_says_how_much_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _library(monkeypatch)
    path = _plan(tmp_path)
    path.write_bytes(b"0123")
    with pytest.raises(BackendError, match=r"holds 4 of the 10 bytes that were built"):
        _load(path)


def test_a_file_that_is_no_plan_is_found_damaged_without_a_gpu(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"not what build() wrote")
    with pytest.raises(BackendError, match="damaged, or no plan at all"):
        _load(path, dataclasses.replace(target, arch="sm_80+"))


def test_without_a_gpu_a_good_plan_is_unavailable_and_not_damaged(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpu(monkeypatch, None)
    built, out = _build(target, tmp_path)
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        _load(out / built.file, built.target)


def test_without_a_gpu_rtx_still_builds_and_tensorrt_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    _library(monkeypatch)
    _gpu(monkeypatch, None)
    probed = BACKEND.probe("tensorrt-rtx")
    assert (probed.arch, probed.present) == ("none", False)
    with pytest.raises(BackendUnavailable, match="TensorRT builds on the GPU that it builds for") as caught:
        BACKEND.probe("tensorrt")
    assert "tensorrt-rtx" in caught.value.fix
    _gpu(monkeypatch, (8, 9))
    assert BACKEND.probe("tensorrt-rtx").arch == "sm_89"


@pytest.mark.parametrize("name", BACKEND.targets)
def test_a_missing_library_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, tensorrt._LIBRARIES[name].module, None)
    with pytest.raises(BackendUnavailable, match="cannot be imported") as caught:
        BACKEND.probe(name)
    assert "pip install" in caught.value.fix
