"""Decoders on ONNX Runtime with our own kernels as its operators."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from medcompile.errors import BackendError, BackendUnavailable
from medcompile.kernels import native
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Silent
from medcompile.spec import Precision, Variant
from tests import decoders as tiny
from tests.backends.test_onnxruntime_paged import BACKEND, LAYERS, TARGET, Oracle, step_batch
from tests.kernels import decoders

if not native.available():
    pytest.skip("medcompile was installed without a C++ compiler", allow_module_level=True)

NARROW = {"kernels": "medcompile", "kv": "bfloat16"}


def built(folder: Path, variant: Variant) -> Path:
    """The file that build() leaves of a decoder whose second layer has a sliding window of 16."""
    spec = decoders.write(folder / "typed.onnx", LAYERS, dtype="FLOAT")
    (folder / variant.name).mkdir()
    made = BACKEND.build(folder / "typed.onnx", spec, variant, TARGET, folder / variant.name)
    assert "2 PagedAttention" in made.notes[0]
    assert "kernels=medcompile" in made.notes
    return folder / variant.name / made.file


@pytest.mark.parametrize("threads", [1, 2])
def test_any_order_of_ragged_steps_gives_the_reference_s_logits_and_pools(tmp_path: Path, threads: int) -> None:
    variant = Variant("fp32", compute={"kernels": "medcompile"})
    model = BACKEND.load_decoder(built(tmp_path, variant), variant, threads, 40)
    oracle = Oracle(tmp_path / "typed.onnx", 40, 32)
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, decoders.VOCABULARY, rng.integers(3, 120)) for _ in range(5)]
    free = rng.permutation(40)
    done = [0] * 5
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        parts, tables = [], []
        for i, text in enumerate(texts):
            if done[i] < len(text) and rng.random() < 0.7:
                count = 1 if rng.random() < 0.4 else min(int(rng.integers(1, 60)), len(text) - done[i])
                parts.append((text[done[i] : done[i] + count], done[i], int(rng.integers(0, count + 1))))
                tables.append(free[8 * i : 8 * i + 8])
                done[i] += count
        if parts:
            batch = step_batch(parts, tables, 32)
            np.testing.assert_allclose(model.step(batch), oracle.step(batch), atol=2e-5)
    for i, (mine, right) in enumerate(zip(model._pools, oracle.pools, strict=True)):
        np.testing.assert_allclose(mine if i % 2 else mine.swapaxes(2, 3), right, atol=1e-5)


def test_bfloat16_pools_are_half_as_large_and_change_little(tmp_path: Path) -> None:
    wide, narrow = Variant("wide", compute={"kernels": "medcompile"}), Variant("narrow", compute=NARROW)
    models = [BACKEND.load_decoder(built(tmp_path, v), v, 1, 8) for v in (wide, narrow)]
    assert models[1].pool_bytes * 2 == models[0].pool_bytes
    batch = step_batch([(np.arange(50), 0, 50)], [np.array([5, 2])], 32)
    first, second = (model.step(batch) for model in models)
    assert 0 < np.abs(second - first).max() < 0.01 * np.abs(first).max()


def test_copied_blocks_go_on_as_their_source_does(tmp_path: Path) -> None:
    variant = Variant("narrow", compute=NARROW)
    model = BACKEND.load_decoder(built(tmp_path, variant), variant, 1, 8)
    model.step(step_batch([(np.arange(20), 0, 0)], [np.array([3])], 32))
    model.copy_blocks([(3, 5)])
    both = model.step(step_batch([(np.array([9]), 20, 1)] * 2, [np.array([3]), np.array([5])], 32))
    np.testing.assert_array_equal(both[0], both[1])
    assert np.abs(both[0]).max() > 0.1


def test_a_graph_without_our_kernels_is_stored_alike_before_and_after_they_were_opened(tmp_path: Path) -> None:
    """ONNX Runtime remembers an operator library's domain for as long as the process lives."""
    program = (
        "import sys; from pathlib import Path; from tests.backends.test_onnxruntime_native import store;"
        " store(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "fresh")], check=True)
    variant = Variant("narrow", compute=NARROW)
    (tmp_path / "ours").mkdir()
    BACKEND.load_decoder(built(tmp_path / "ours", variant), variant, 1, 8).close()
    store(tmp_path / "here")
    assert (tmp_path / "here/out/model.onnx").read_bytes() == (tmp_path / "fresh/out/model.onnx").read_bytes()


def store(folder: Path) -> None:
    (folder / "out").mkdir(parents=True)
    spec = decoders.write(folder / "typed.onnx", LAYERS, dtype="FLOAT")
    variant = Variant("fp32", compute={"kernels": "onnxruntime"})
    BACKEND.build(folder / "typed.onnx", spec, variant, TARGET, folder / "out")


def test_kernels_that_nobody_has_are_refused(tmp_path: Path) -> None:
    spec = decoders.write(tmp_path / "typed.onnx", LAYERS, dtype="FLOAT")
    with pytest.raises(BackendError, match=r"compute\.kernels is 'mine'"):
        BACKEND.build(tmp_path / "typed.onnx", spec, Variant("fp32", compute={"kernels": "mine"}), TARGET, tmp_path)


def test_without_the_compiled_library_a_decoder_that_needs_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant("narrow", compute=NARROW)
    path = built(tmp_path, variant)
    native.library.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    try:
        with pytest.raises(BackendUnavailable, match=r"install a C\+\+17 compiler"):
            BACKEND.load_decoder(path, variant, 1, 8)
    finally:
        native.library.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 4])
def test_int4_products_are_ours_where_activations_may_be_rounded(level: int, tmp_path: Path) -> None:
    """Beside ONNX Runtime's own kernels, on the same typed graph."""
    folder = tiny.write_checkpoint(next(iter(tiny.KINDS)), tmp_path / "model")
    program = tiny.simplified(folder)
    found = {}
    for kernels in ("medcompile", "onnxruntime"):
        compute = {"kernels": kernels, "accuracy_level": level}
        variant = Variant("int4", weights=Precision.INT4, block_size=32, compute=compute)
        quantized = Quantize()(program, Context(tmp_path, Silent(), variant=variant))
        typed = tiny.write_graph(quantized, tmp_path / f"typed-{kernels}")
        (tmp_path / kernels).mkdir()
        made = BACKEND.build(typed, quantized.graphs["generate"].spec, variant, TARGET, tmp_path / kernels)
        model = BACKEND.load_decoder(tmp_path / kernels / made.file, variant, 1, 24)
        nodes = onnx.load(tmp_path / kernels / made.file, load_external_data=False).graph.node
        ours = {node.op_type for node in nodes} & {"MatMulInt4", "GatedMatMulInt4"}
        assert len(ours) == (2 if kernels == "medcompile" and level == 4 else 0)
        given = [np.random.default_rng(n).integers(3, tiny.VOCABULARY, n) for n in (1, 70, 12)]
        found[kernels] = np.concatenate(tiny.chunked_logits(model, given))
    error = np.abs(found["medcompile"] - found["onnxruntime"]).max()
    assert error < (1e-3 if level == 1 else 0.05) * np.abs(found["onnxruntime"]).max()
