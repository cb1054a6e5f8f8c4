from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino", reason="the openvino extra is not installed")

from medcompile import backends
from medcompile.backends import openvino
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.run_onnx import run_onnx
from medcompile.spec import Variant
from tests import graphs

BACKEND = backends.for_target("openvino-cpu")


def _run(variant: Variant, folder: Path) -> tuple[np.ndarray, backends.Built]:
    out = folder / "out"
    out.mkdir(parents=True)
    source = graphs.write(variant, folder / "typed")
    built = BACKEND.build(source, graphs.SPEC, variant, BACKEND.probe("openvino-cpu"), out)
    with BACKEND.load(out / built.file, graphs.SPEC, variant, built.target, 1) as executor:
        return executor.run(graphs.feeds(4, 24))["embedding"], built


def test_every_setting_is_named_even_where_the_variant_is_silent(tmp_path: Path) -> None:
    _, built = _run(graphs.VARIANTS["fp32"], tmp_path / "a")
    assert built.notes == ("float=float32", "dynamic_group=0", "streams=1")
    _, built = _run(Variant("two", compute={"streams": 2}), tmp_path / "b")
    assert built.notes == ("float=float32", "dynamic_group=0", "streams=2")


@pytest.mark.parametrize("name", ["fp32", "dynamic"])
def test_what_was_compiled_at_build_answers_as_what_is_compiled_at_load(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = _run(graphs.VARIANTS[name], tmp_path)
    out = tmp_path / "out"
    assert (out / "model.blob").stat().st_size < (out / "model.bin").stat().st_size + 2**20
    used = []
    before = openvino._compiled_before
    monkeypatch.setattr(openvino, "_compiled_before", lambda *a: used.append(before(*a)) or used[-1])
    for machine in ((out / "model.machine").read_text(), "another CPU\n"):
        (out / "model.machine").write_text(machine)
        with BACKEND.load(
            out / "model.xml", graphs.SPEC, graphs.VARIANTS[name], BACKEND.probe("openvino-cpu"), 1
        ) as executor:
            np.testing.assert_array_equal(executor.run(graphs.feeds(4, 24))["embedding"], result)
    assert used[0] is not None, "the compiled graph of this very machine is used"
    assert used[1] is None, "that of another is not"


def test_a_damaged_compiled_graph_is_compiled_anew(tmp_path: Path) -> None:
    result, built = _run(graphs.VARIANTS["fp32"], tmp_path)
    (tmp_path / "out" / "model.blob").write_bytes(b"no compiled graph")
    with BACKEND.load(tmp_path / "out/model.xml", graphs.SPEC, graphs.VARIANTS["fp32"], built.target, 1) as executor:
        np.testing.assert_array_equal(executor.run(graphs.feeds(4, 24))["embedding"], result)


def test_fp32_is_fp32(tmp_path: Path) -> None:
    """The library's own default on a CPU with bfloat16 would be bfloat16."""
    onnxruntime = backends.for_target("onnxruntime-cpu")
    result, _ = _run(graphs.VARIANTS["fp32"], tmp_path)
    out = tmp_path / "other"
    out.mkdir()
    source = tmp_path / "typed" / "embed.onnx"
    target = onnxruntime.probe("onnxruntime-cpu")
    built = onnxruntime.build(source, graphs.SPEC, graphs.VARIANTS["fp32"], target, out)
    with onnxruntime.load(out / built.file, graphs.SPEC, graphs.VARIANTS["fp32"], target, 1) as executor:
        np.testing.assert_allclose(result, executor.run(graphs.feeds(4, 24))["embedding"], atol=1e-5)


def test_dynamic_products_become_stored_int8_weights_and_the_notes_say_so(tmp_path: Path) -> None:
    result, built = _run(graphs.VARIANTS["dynamic"], tmp_path / "dynamic")
    reference, _ = _run(graphs.VARIANTS["fp32"], tmp_path / "fp32")
    assert built.notes[1] == "dynamic_group=128"
    assert built.notes[-1].startswith("6 products")
    assert "MatMulInteger" not in (tmp_path / "dynamic" / "out" / "model.xml").read_text()
    assert np.abs(result - reference).max() < 0.05


def test_a_mixed_graph_rounds_its_dynamic_layer_at_run_time_and_tells_what_else_may_be(tmp_path: Path) -> None:
    result, built = _run(graphs.VARIANTS["mixed"], tmp_path / "mixed")
    typed = next(run_onnx(graphs.typed(graphs.VARIANTS["mixed"]), iter([graphs.feeds(4, 24)]), ("embedding",)))
    assert built.notes[1] == "dynamic_group=128"
    assert built.notes[-2].startswith("1 products")
    assert "weight-only products too" in built.notes[-1]
    assert np.abs(result - typed["embedding"]).max() < 0.05
    _, built = _run(graphs.VARIANTS["mixed static"], tmp_path / "static")
    assert built.notes == ("float=float32", "dynamic_group=0", "streams=1")


def test_an_unknown_float_format_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="float8") as caught:
        _run(Variant("odd", compute={"float": "float8"}), tmp_path)
    assert "bfloat16" in caught.value.fix


def test_a_format_that_the_cpu_lacks_is_refused_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(BackendError, match="bfloat16"):
        _run(Variant("bf16", compute={"float": "bfloat16"}), tmp_path)


def test_importing_the_library_starts_nothing_that_reports_home() -> None:
    code = (
        "from medcompile import backends, spec; import sys, threading\n"
        "backends.for_target('openvino-cpu').probe('openvino-cpu')\n"
        "home = [m for m in sys.modules if m.startswith(('openvino_telemetry', 'openvino.tools'))]\n"
        "print(home, threading.active_count())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] 1"


def test_a_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailable) as caught:
        BACKEND.probe("openvino-cpu")
    assert "medcompile[openvino]" in caught.value.fix
