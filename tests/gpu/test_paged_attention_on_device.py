"""The attention kernels, their plugin and whole decoders on a real device. Without one all is skipped; none of it has
run on a GPU yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import backends, sources
from medcompile.backends import _cuda, tensorrt
from medcompile.backends._cuda import Cuda
from medcompile.errors import BackendUnavailable
from medcompile.kernels import launches, tensorrt_plugin
from medcompile.kernels.launcher import Launcher
from medcompile.kernels.launches import Face
from medcompile.kernels.reference import paged_attention
from medcompile.passes.cast import Cast
from medcompile.program import Context, Silent
from medcompile.spec import Axis, Precision, Profile, Variant
from tests import decoders as whole
from tests.kernels import decoders
from tests.kernels.batches import draw

pytestmark = pytest.mark.gpu

Array = np.ndarray[Any, Any]
MIXED = [(0, 190), (33, 1), (3, 0), (15, 18), (700, 1)]
STEPS = [(1200, 1), (0, 1), (15, 1), (16, 1), (63, 1)]
MANY = [(40 + i, 1) for i in range(200)]


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    try:
        return _cuda.open_cuda()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@contextmanager
def on_device(cuda: Cuda, arrays: dict[str, Array], stream: int) -> Iterator[dict[str, int]]:
    """The arrays' addresses on the device; what lies there at the end is copied back into them."""
    with ExitStack() as stack:
        places = {}
        for name, array in arrays.items():
            places[name] = cuda.malloc(max(256, array.nbytes))
            stack.callback(cuda.free, places[name])
            cuda.copy_to_device(places[name], array.ctypes.data, array.nbytes, stream)
        cuda.synchronize(stream)
        yield places
        for name, array in arrays.items():
            cuda.copy_to_host(array.ctypes.data, places[name], array.nbytes, stream)
        cuda.synchronize(stream)


@pytest.mark.parametrize("lengths", [MIXED, STEPS, MANY], ids=["mixed", "split steps", "steps"])
@pytest.mark.parametrize("face", [Face(8, 2, 64, 32), Face(9, 3, 64, 16), Face(4, 4, 128, 32), Face(4, 1, 80, 32)])
@pytest.mark.parametrize("window", [0, 50])
def test_the_kernels_give_what_the_reference_gives(
    cuda: Cuda, face: Face, lengths: list[tuple[int, int]], window: int
) -> None:
    pytest.importorskip("triton")
    from medcompile.kernels import ptx

    shape = {"heads": face.heads, "kv_heads": face.kv_heads, "head_dim": face.head_dim}
    scale = face.head_dim**-0.5
    batch = draw(lengths, **shape, block_size=face.block_size, dtype=np.float16)
    q, *rest = batch.arrays
    wanted = paged_attention(q.astype(np.float32), *rest, **shape, scale=scale, sliding_window=window)
    step = launches.plan(face, len(q), len(lengths), batch.block_table.shape[1])
    arrays = dict(zip(tensorrt_plugin.INPUTS, batch.arrays, strict=True)) | {"out": np.zeros_like(q)}
    workspace = np.full(max(256, step.partial_bytes + step.stats_bytes + 256) // 4, np.nan, np.float32)
    stream = cuda.create_stream()
    with on_device(cuda, arrays | {"workspace": workspace}, stream) as at:
        addresses = [at[name] for name in tensorrt_plugin.INPUTS]
        shapes = [array.shape for array in batch.arrays]
        given = tensorrt_plugin.values(addresses, at["out"], at["workspace"], step, shapes)
        given |= {"scale": scale, "window": launches.window(window)}
        Launcher(ptx.compile_kernels(face)).run(step, given, stream)
    cuda.destroy_stream(stream)
    np.testing.assert_allclose(arrays["out"].astype(np.float32), wanted, rtol=0, atol=4e-3)
    np.testing.assert_array_equal(arrays["k_pool"].view(np.uint16), rest[2].view(np.uint16))


@pytest.mark.parametrize(("past", "new"), [([0], [120]), ([40, 7, 0, 200], [1, 1, 1, 1])], ids=["prefill", "decode"])
def test_an_engine_with_the_plugin_gives_what_its_graph_gives_and_updates_its_pools(
    cuda: Cuda, tmp_path: Path, past: list[int], new: list[int]
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    typed, out = tmp_path / "typed", tmp_path / "out"
    typed.mkdir()
    out.mkdir()
    spec = decoders.write(typed / "generate.onnx")
    variant = Variant("fp16", float_dtype=Precision.FLOAT16)
    backend = tensorrt.BACKEND
    built = backend.build(typed / "generate.onnx", spec, variant, backend.probe("tensorrt-rtx"), out)
    wanted = decoders.feeds(past, new)
    given = {name: array.copy() for name, array in wanted.items()} | {
        "logits": np.zeros((len(new), decoders.VOCABULARY), np.float32)
    }
    logits = decoders.answer(typed / "generate.onnx", wanted)
    tensorrt_plugin.register(trt)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine((out / built.file).read_bytes())
    context = engine.create_execution_context()
    stream = cuda.create_stream()
    assert context.set_optimization_profile_async(0 if len(new) == 1 else 1, stream)
    with on_device(cuda, given, stream) as at:
        for name, place in at.items():
            assert name == "logits" or context.set_input_shape(name, given[name].shape)
            assert context.set_tensor_address(name, place)
        assert context.execute_async_v3(stream)
        cuda.synchronize(stream)
    np.testing.assert_allclose(given["logits"], logits, rtol=0, atol=2e-2)
    for name in ("k_pool.0", "v_pool.1"):
        np.testing.assert_allclose(given[name].astype(np.float32), wanted[name].astype(np.float32), rtol=0, atol=2e-2)
    cuda.destroy_stream(stream)


@pytest.mark.parametrize("kind", ["llama", "window"])
@pytest.mark.parametrize(
    ("target", "precision", "close"),
    [
        ("tensorrt-rtx", Precision.FLOAT32, 5e-2),
        ("tensorrt-rtx", Precision.FLOAT16, 3e-1),
        ("tensorrt", Precision.FLOAT16, 3e-1),
        ("onnxruntime-cuda", Precision.FLOAT16, 3e-1),
    ],
)
def test_a_decoder_on_the_device_gives_every_token_the_logits_of_transformers(
    cuda: Cuda, kind: str, target: str, precision: Precision, close: float, tmp_path: Path
) -> None:
    """In ragged chunks. Logits of these models reach 20, and half precision keeps three digits of what makes them up;
    float32 products may be made in TF32 by the attention kernels."""
    pytest.importorskip("torch")
    from medcompile.models import llama
    from medcompile.passes.export import export
    from medcompile.passes.simplify import Simplify

    backend = backends.for_target(target)
    try:
        here = backend.probe(target)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    checkpoint = whole.write_checkpoint(kind, tmp_path / "model")
    axes = {"batch": (1, 2, 8), "sequence": (1, 32, whole.POSITIONS)}
    asked = Profile("default", tuple(Axis(name, *ends) for name, ends in axes.items()))
    variant = Variant("v", float_dtype=precision)
    context = Context(Path(), Silent())
    options = replace(whole.OPTIONS, profiles=(asked,))
    exported = export(llama.FAMILY, sources.resolve(f"path:{checkpoint}"), options)
    program = Cast(precision)(Simplify()(exported, context), context)
    (tmp_path / "out").mkdir()
    typed = whole.write_graph(program, tmp_path / "typed")
    built = backend.build(typed, program.graphs["generate"].spec, variant, here, tmp_path / "out")
    model = backends.load_decoder(backend, tmp_path / "out" / built.file, variant, None, 24)
    texts = [np.random.default_rng(n).integers(3, whole.VOCABULARY, n) for n in (1, 70, 33, 12)]
    reference = whole.reference(checkpoint)
    for ids, logits in zip(texts, whole.chunked_logits(model, texts), strict=True):
        np.testing.assert_allclose(logits, whole.logits_of(reference, ids), rtol=0, atol=close)
    before = cuda.memory()[0]
    model.close()
    assert cuda.memory()[0] >= before
