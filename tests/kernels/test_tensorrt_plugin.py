"""The plugin: in TensorRT-RTX's own classes over a fake driver, and built into engines without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medcompile.backends import tensorrt
from medcompile.errors import BackendError
from medcompile.kernels import launcher, launches, tensorrt_plugin
from medcompile.kernels.compiled import Kernels
from medcompile.kernels.launcher import Launcher
from medcompile.spec import Precision, Variant
from tests.kernels import decoders
from tests.kernels.test_launcher import FakeDriver

trt = pytest.importorskip("tensorrt_rtx")

TOKENS, SEQUENCES, TABLE, BLOCKS = 3, 3, 64, 200
SHAPES = [(TOKENS, 128), (TOKENS, 64), (TOKENS, 64), *[(BLOCKS, 2, 16, 32)] * 2, (SEQUENCES + 1,), (SEQUENCES,)]
SHAPES.append((SEQUENCES, TABLE))
INPUTS = [0x10000 * (i + 1) for i in range(8)]
OUTPUTS = [0x900000, INPUTS[3], INPUTS[4]]


def node_fields(**changed: int) -> tuple[Any, list[Any]]:
    """What the parser gives for a node, and the arrays behind it, which a field does not keep alive."""
    face = {"heads": 4, "kv_heads": 2, "head_dim": 32, "sliding_window": 24, "layer": 5} | changed
    arrays = {n: np.array([x], np.int32) for n, x in face.items()} | {"scale": np.array([0.25], np.float32)}
    kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}
    fields = [trt.PluginField(n, array, kinds[array.dtype.name]) for n, array in arrays.items()]
    return trt.PluginFieldCollection(fields), [*arrays.values(), *fields]


def create(creator: Any, **changed: int) -> Any:
    fields, kept = node_fields(**changed)
    made = creator.create_plugin("layer", fields, trt.TensorRTPhase.BUILD)
    assert kept
    return made


@pytest.fixture
def plugin(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One layer's, as a build makes it, over a fake driver."""
    monkeypatch.setattr(launcher, "_loaded", {})
    creator = tensorrt_plugin.creator_of(trt)
    creator.kernels = kernels
    made = create(creator)
    made.launcher = Launcher(kernels, FakeDriver())
    return made


def enqueue(plugin: Any, inputs: list[int], outputs: list[int]) -> None:
    descs = [SimpleNamespace(dims=shape) for shape in SHAPES]
    plugin.enqueue(descs, [], inputs, outputs, 0xA00000, 0xABC)


def test_enqueue_launches_the_plan_of_the_shapes_with_every_tensor_in_its_place(plugin: Any, kernels: Kernels) -> None:
    enqueue(plugin, INPUTS, OUTPUTS)
    step = launches.plan(kernels.face, TOKENS, SEQUENCES, TABLE)
    launched = plugin.launcher._driver.launched
    assert [asked[1:4] for asked in launched] == [launch.grid for launch in step.launches]
    by_name: dict[str, Any] = {}
    for launch, asked in zip(step.launches, launched, strict=True):
        names = [name for name, _ in kernels.modules["sm_80"].entries[launch.kernel].arguments]
        by_name |= dict(zip(names, asked[9][0], strict=False))
        assert asked[8] == 0xABC
    assert [by_name[name] for name in tensorrt_plugin.INPUTS] == INPUTS
    assert by_name["out"] == OUTPUTS[0]
    assert (by_name["sequences"], by_name["table_width"], by_name["splits"]) == (SEQUENCES, TABLE, step.splits)
    assert (by_name["scale"], by_name["window"]) == (0.25, 24)
    assert by_name["partial"] == 0xA00000
    assert by_name["stats"] >= by_name["partial"] + step.partial_bytes


def test_the_workspace_of_the_largest_batch_holds_what_any_step_writes(plugin: Any, kernels: Kernels) -> None:
    largest = [SimpleNamespace(max=shape) for shape in SHAPES]
    size = plugin.get_workspace_size(largest, [])
    enqueue(plugin, INPUTS, OUTPUTS)
    step = launches.plan(kernels.face, TOKENS, SEQUENCES, TABLE)
    reduce = kernels.modules["sm_80"].entries["reduce"]
    stats = dict(zip((n for n, _ in reduce.arguments), plugin.launcher._driver.launched[-1][9][0], strict=False))[
        "stats"
    ]
    assert stats + step.stats_bytes <= 0xA00000 + size


def test_a_pool_that_tensorrt_copied_is_an_error(plugin: Any) -> None:
    with pytest.raises(BackendError, match="k_pool to write into at another address"):
        enqueue(plugin, INPUTS, [OUTPUTS[0], 0xB00000, OUTPUTS[2]])
    assert plugin.launcher._driver.launched == []


def test_an_address_that_the_kernels_do_not_expect_is_an_error(plugin: Any) -> None:
    with pytest.raises(BackendError, match="q lies at 0x10008"):
        enqueue(plugin, [INPUTS[0] + 8, *INPUTS[1:]], OUTPUTS)


def test_what_goes_into_a_plan_makes_the_same_plugin_without_kernels_at_hand(plugin: Any, kernels: Kernels) -> None:
    carried = plugin.get_fields_to_serialize()
    again = tensorrt_plugin.creator_of(trt).create_plugin("layer", carried, trt.TensorRTPhase.RUNTIME)
    assert again.kernels == kernels
    assert (
        again.attributes == plugin.attributes == {**again.attributes, "layer": 5, "sliding_window": 24, "scale": 0.25}
    )
    assert again.clone().launcher is again.launcher


def test_a_layer_of_other_heads_than_its_kernels_is_refused(kernels: Kernels) -> None:
    creator = tensorrt_plugin.creator_of(trt)
    with pytest.raises(BackendError, match="no kernels are at hand"):
        create(creator)
    creator.kernels = kernels
    with pytest.raises(BackendError, match="other heads than its kernels"):
        create(creator, heads=8)


def test_the_plugin_and_its_launcher_import_no_compiler() -> None:
    code = "import sys, medcompile.kernels.tensorrt_plugin; print(' '.join(m.partition('.')[0] for m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded).isdisjoint({"torch", "triton", "onnx", "onnx_ir", "onnxscript"})


@pytest.mark.slow
@pytest.mark.parametrize("cast_pools", [False, True], ids=["pools in float16", "pools cast to float16"])
def test_a_decoder_with_prefill_and_decode_profiles_builds_without_a_gpu(tmp_path: Path, cast_pools: bool) -> None:
    """Built, not run: no GPU has executed one."""
    typed, out = tmp_path / "typed", tmp_path / "out"
    typed.mkdir()
    out.mkdir()
    spec = decoders.write(typed / "generate.onnx", layers=2, cast_pools=cast_pools)
    before = (typed / "generate.onnx").read_bytes()
    variant = Variant("fp16", float_dtype=Precision.FLOAT16)
    backend = tensorrt.BACKEND
    built = backend.build(typed / "generate.onnx", spec, variant, backend.probe("tensorrt-rtx"), out)
    assert (typed / "generate.onnx").read_bytes() == before
    plan = (out / built.file).read_bytes()
    kernels = Kernels.read(out / "kernels")
    assert plan.count(kernels.pack()) == 2 * len(spec.profiles)  # every layer's plugin carries them
    assert any("paged attention kernels" in note for note in built.notes)
    table = json.loads((out / "layers.json").read_text())
    attention = [row for row in table["layers"] if row["kind"] == "PluginV3"]
    assert len(attention) == 2 * len(spec.profiles)
    assert not [row["name"] for row in table["layers"] if "pool" in row["name"]]  # no pool is copied or cast
    assert {b["name"]: b["format"] for b in table["bindings"]}["k_pool.0"] == "float16"
    validity = trt.Runtime(trt.Logger()).get_engine_validity
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    assert not int(validity(plan)[1]) & malformed
    assert int(validity(b"\0" * 64 + plan[64:])[1]) & malformed
