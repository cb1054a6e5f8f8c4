"""Decoders on ONNX Runtime's CPU provider: tiles over ragged batches, and pools that are updated where they lie."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from medcompile.backends import get, onnxruntime
from medcompile.backends._onnxruntime_paged import OnnxRuntimeStepModel, tile_width
from medcompile.errors import BackendError
from medcompile.kernels.reference import paged_attention
from medcompile.runtime.decoder import StepBatch
from medcompile.spec import GraphSpec, Precision, Target, TensorSpec, Variant
from tests import decoders as tiny
from tests.kernels import decoders

Array = np.ndarray[Any, Any]

TARGET = Target("onnxruntime-cpu", "onnxruntime", "cpu", platform.machine(), platform.system().lower(), "")
LAYERS = 2
BACKEND: Any = get("onnxruntime")
VARIANT = Variant("fp32", compute={"kernels": "onnxruntime"})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of two layers, the second with a sliding window of 16, as build() leaves it. typed.onnx: before."""
    folder = tmp_path_factory.mktemp("decoder")
    spec = decoders.write(folder / "typed.onnx", LAYERS, dtype="FLOAT")
    (folder / "built").mkdir()
    made = BACKEND.build(folder / "typed.onnx", spec, VARIANT, TARGET, folder / "built")
    assert "2 paged attention" in made.notes[0]
    return folder


def opened(built: Path, blocks: int, block_size: int = 32) -> OnnxRuntimeStepModel:
    session = onnxruntime._session(built / "built/model.onnx", onnxruntime._load_options(1))
    return OnnxRuntimeStepModel(session, blocks=blocks, block_size=block_size)


class Oracle:
    """The same decoder in numpy, with pools of its own."""

    def __init__(self, path: Path, blocks: int, block_size: int) -> None:
        model = onnx.load(path)
        self._weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
        self._attention = [n for n in model.graph.node if n.op_type == "PagedAttention"]
        shape = (blocks, decoders.KV_HEADS, block_size, decoders.HEAD_DIM)
        self.pools = [np.zeros(shape, np.float32) for _ in range(2 * LAYERS)]

    def step(self, batch: StepBatch) -> Array:
        w = self._weights
        x = w["embedding"][batch.input_ids]
        for layer, node in enumerate(self._attention):
            window = next(a.i for a in node.attribute if a.name == "sliding_window")
            q, k, v = (x @ w[f"layers.{layer}.{part}.weight"] for part in "qkv")
            given: list[Array] = [q, k, v, *self.pools[2 * layer : 2 * layer + 2]]
            given += [batch.query_starts, batch.past_lens, batch.block_table]
            mixed = paged_attention(
                *given,
                heads=decoders.HEADS,
                kv_heads=decoders.KV_HEADS,
                head_dim=decoders.HEAD_DIM,
                scale=decoders.HEAD_DIM**-0.5,
                sliding_window=window,
            )
            x = x + mixed @ w[f"layers.{layer}.o"]
        found: Array = x[batch.logit_rows] @ w["head"]
        return found


def step_batch(parts: Sequence[tuple[Array, int, int]], tables: Sequence[Array], block_size: int) -> StepBatch:
    """parts: (ids, past, rows) of each sequence: its new tokens, how many came before, how many give logits."""
    starts = np.cumsum([0, *(len(ids) for ids, _, _ in parts)])
    used = [-(-(past + len(ids)) // block_size) for ids, past, _ in parts]
    table = np.zeros((len(parts), max(used)), np.int32)
    for row, blocks, count in zip(table, tables, used, strict=True):
        row[:count] = blocks[:count]
    return StepBatch(
        np.concatenate([ids for ids, _, _ in parts]),
        np.concatenate([past + np.arange(len(ids)) for ids, past, _ in parts]),
        starts.astype(np.int32),
        np.array([past for _, past, _ in parts], np.int32),
        table,
        np.concatenate([np.arange(end - rows, end) for end, (_, _, rows) in zip(starts[1:], parts, strict=True)]),
    )


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_ragged_steps_gives_the_reference_s_logits_and_pools(
    built: Path, block_size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = 40
    model, oracle = opened(built, blocks, block_size), Oracle(built / "typed.onnx", blocks, block_size)
    texts = [rng.integers(0, decoders.VOCABULARY, rng.integers(3, 120)) for _ in range(5)]
    free = rng.permutation(blocks)
    tables = [free[8 * i : 8 * i + 8] for i in range(5)]
    done = [0] * 5
    steps = 0
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        chosen = [i for i in range(5) if done[i] < len(texts[i]) and rng.random() < 0.7]
        if not chosen:
            continue
        parts = []
        for i in chosen:
            count = 1 if rng.random() < 0.4 else min(int(rng.integers(1, 60)), len(texts[i]) - done[i])
            parts.append((texts[i][done[i] : done[i] + count], done[i], int(rng.integers(0, count + 1))))
            done[i] += count
        batch = step_batch(parts, [tables[i] for i in chosen], block_size)
        np.testing.assert_allclose(model.step(batch), oracle.step(batch), atol=2e-5)
        steps += 1
    assert steps > 2
    for mine, right in zip(model._pools, oracle.pools, strict=True):
        np.testing.assert_allclose(mine, right, atol=1e-5)


def test_a_step_updates_its_blocks_where_they_lie_and_copies_none_of_the_pools(built: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").is_file():
        pytest.skip("this system does not tell a process's resident memory")
    model = opened(built, blocks=1 << 16)
    batch = step_batch([(np.arange(40), 0, 1)], [np.array([7, 60_000])], 32)
    opened(built, blocks=64).step(
        step_batch([(np.arange(40), 0, 1)], [np.array([7, 60])], 32)
    )  # what any first step takes
    before = resident_bytes()
    model.step(batch)
    assert model.pool_bytes > 2_000_000_000
    assert resident_bytes() - before < 50_000_000
    for pool in model._pools:
        assert np.flatnonzero(pool[[7, 60_000, 8, 59_999]].any(axis=(1, 2, 3))).tolist() == [0, 1]


def test_copied_blocks_go_on_as_their_source_does(built: Path) -> None:
    model = opened(built, blocks=8)
    model.step(step_batch([(np.arange(20), 0, 0)], [np.array([3])], 32))
    model.copy_blocks([(3, 5)])
    both = model.step(step_batch([(np.array([9]), 20, 1)] * 2, [np.array([3]), np.array([5])], 32))
    np.testing.assert_array_equal(both[0], both[1])
    assert np.abs(both[0]).max() > 0.1


def test_a_chunk_that_nobody_asks_logits_of_gives_none(built: Path) -> None:
    assert opened(built, 4).step(step_batch([(np.arange(9), 0, 0)], [np.array([1])], 32)).shape == (
        0,
        decoders.VOCABULARY,
    )


def test_a_closed_decoder_says_so(built: Path) -> None:
    model = opened(built, 4)
    model.close()
    with pytest.raises(BackendError, match="closed"):
        model.step(step_batch([(np.arange(2), 0, 1)], [np.array([1])], 32))


def test_what_the_library_refuses_is_told_as_an_error_of_the_backend(built: Path) -> None:
    with pytest.raises(BackendError, match=r"ONNX Runtime failed: .*Gather.*out of.* bounds"):
        opened(built, 4).step(step_batch([(np.array([decoders.VOCABULARY]), 0, 1)], [np.array([1])], 32))


@pytest.mark.parametrize(
    ("new", "width"), [([1, 1, 1], 1), ([256], 256), ([4, 4, 4], 4), ([256, 1, 1, 1, 1, 1, 1, 1], 16)]
)
def test_tiles_are_as_wide_as_costs_least(new: list[int], width: int) -> None:
    assert tile_width(np.array(new)) == width


@pytest.mark.parametrize(("level", "error"), [(1, 1e-5), (4, 0.05)])
def test_int4_weights_run_packed_at_the_accuracy_that_the_variant_names(
    tmp_path: Path, level: int, error: float
) -> None:
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-7, 8, (64, 48)), rng.uniform(0.01, 0.1, (2, 48)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=0, block_size=32),
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 48])],
        [
            helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.ravel()),
            numpy_helper.from_array(scales, "scales"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "typed.onnx"
    )
    spec = GraphSpec(
        "linear", (TensorSpec("x", "float32", ("rows", 64)),), (TensorSpec("y", "float32", ("rows", 48)),), ()
    )
    variant = Variant(
        "int4", weights=Precision.INT4, block_size=32, compute={"accuracy_level": level, "kernels": "onnxruntime"}
    )
    (tmp_path / "out").mkdir()
    made = BACKEND.build(tmp_path / "typed.onnx", spec, variant, TARGET, tmp_path / "out")
    assert f"accuracy_level={level}" in made.notes
    nodes = onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.node
    assert [(n.op_type, a.i) for n in nodes for a in n.attribute if a.name == "accuracy_level"] == [
        ("MatMulNBits", level)
    ]
    x = rng.standard_normal((3, 64)).astype(np.float32)
    right = x @ (codes * np.repeat(scales, 32, axis=0))
    with BACKEND.load(tmp_path / "out/model.onnx", spec, variant, TARGET, 1) as executor:
        np.testing.assert_allclose(executor.run({"x": x})["y"], right, atol=error * np.abs(right).max())


def test_an_accuracy_level_that_the_library_lacks_is_refused(tmp_path: Path, built: Path) -> None:
    variant = Variant("int4", weights=Precision.INT4, block_size=32, compute={"accuracy_level": 3})
    with pytest.raises(BackendError, match="accuracy_level is 3"):
        BACKEND.build(built / "typed.onnx", decoders.spec(LAYERS), variant, TARGET, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_ragged_chunks_give_every_token_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(kind, tmp_path / "model")
    program = tiny.simplified(folder)
    typed = tiny.write_graph(program, tmp_path / "typed")
    (tmp_path / "out").mkdir()
    made = BACKEND.build(typed, program.graphs["generate"].spec, VARIANT, TARGET, tmp_path / "out")
    model = BACKEND.load_decoder(tmp_path / "out" / made.file, VARIANT, 1, 24)
    reference = tiny.reference(folder)
    given = [np.random.default_rng(n).integers(3, tiny.VOCABULARY, n) for n in (1, 70, 33, 12)]
    for ids, logits in zip(given, tiny.chunked_logits(model, given), strict=True):
        np.testing.assert_allclose(logits, tiny.logits_of(reference, ids), rtol=1e-3, atol=5e-4)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_generate(tmp_path: Path, shared: Path) -> None:
    import torch

    folder, length = shared / "models/tiny-medllama", 24
    program = tiny.simplified(folder)
    typed = tiny.write_graph(program, tmp_path / "typed")
    (tmp_path / "built").mkdir()
    made = BACKEND.build(typed, program.graphs["generate"].spec, VARIANT, TARGET, tmp_path / "built")
    assert "4 paged attention, 9 RMS norm, 8 rotary embedding" in made.notes[0]
    decoder = BACKEND.load_decoder(tmp_path / "built" / made.file, VARIANT, 1, 64)

    torch.set_num_threads(1)
    original = tiny.reference(folder)
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 4096, size) for size in (3, 70, 33, 17)]
    tables = [np.arange(4 * i, 4 * i + 4) for i in range(len(texts))]
    fresh, done = [text.copy() for text in texts], [0] * len(texts)
    for _ in range(length):  # all prompts in the first step, then a token each
        batch = step_batch([(ids, past, 1) for ids, past in zip(fresh, done, strict=True)], tables, 32)
        done = [past + len(ids) for ids, past in zip(fresh, done, strict=True)]
        fresh = [np.array([token]) for token in decoder.step(batch).argmax(axis=1)]
        texts = [np.concatenate(pair) for pair in zip(texts, fresh, strict=True)]
    for text in texts:
        prompt = torch.from_numpy(text[:-length])[None]
        right = original.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length, eos_token_id=None
        )
        np.testing.assert_array_equal(text, right[0].numpy())
