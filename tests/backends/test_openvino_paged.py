"""OpenVINO's paged attention under our graphs: every token as transformers gives it, whatever the batches were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="the openvino extra is not installed")

from medcompile import backends
from medcompile.backends.openvino import OpenVinoBackend
from medcompile.errors import BackendError
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Program, Silent
from medcompile.spec import Precision, Variant
from tests import decoders

BACKEND = OpenVinoBackend()
FP32 = Variant("fp32")
# fp32 in another order of summation; logits of these models reach 20.
CLOSE = {"rtol": 1e-3, "atol": 5e-4}


def build(program: Program, variant: Variant, folder: Path) -> tuple[Path, backends.Built]:
    path = decoders.write_graph(program, folder / "typed")
    out = folder / "out"
    out.mkdir()
    built = BACKEND.build(path, program.graphs["generate"].spec, variant, BACKEND.probe("openvino-cpu"), out)
    return out / built.file, built


def load(program: Program, folder: Path, variant: Variant = FP32, blocks: int = 24) -> Any:
    path, _ = build(program, variant, folder)
    return BACKEND.load_decoder(path, variant, 1, blocks)


def texts(seed: int = 0, vocabulary: int = decoders.VOCABULARY, lengths: tuple[int, ...] = (1, 70, 33, 12)) -> Any:
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary, n) for n in lengths]


@pytest.mark.parametrize("kind", decoders.KINDS)
def test_ragged_chunks_give_every_token_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = decoders.write_checkpoint(kind, tmp_path / "model")
    model = load(decoders.simplified(folder), tmp_path)
    reference = decoders.reference(folder)
    given = texts()
    for ids, logits in zip(given, decoders.chunked_logits(model, given), strict=True):
        np.testing.assert_allclose(logits, decoders.logits_of(reference, ids), **CLOSE)
    model.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("tiny"))
    return folder, decoders.simplified(folder)


@pytest.mark.parametrize(
    ("compute", "limit"),
    [({}, 1e-4), ({"float": "bfloat16"}, 0.1), ({"kv": "uint8"}, 0.03)],
    ids=["float32", "bfloat16", "uint8"],
)
def test_each_format_of_keys_and_values_costs_what_it_should(
    compute: dict[str, str], limit: float, tiny: tuple[Path, Program], tmp_path: Path
) -> None:
    import openvino

    if "float" in compute and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    folder, program = tiny
    model = load(program, tmp_path, Variant("kv", compute=compute))
    (ids,) = texts(lengths=(60,))
    (logits,) = decoders.chunked_logits(model, [ids])
    expected = decoders.logits_of(decoders.reference(folder), ids)
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < limit
    bytes_per_value = 2 if "float" in compute else None if "kv" in compute else 4
    values = 2 * 2 * 24 * 32 * 2 * 32  # k and v, layers, blocks, tokens, heads, head_dim
    if bytes_per_value:
        assert model.pool_bytes == values * bytes_per_value
    else:
        assert values < model.pool_bytes < values * 1.5, "a scale and an offset for every few"


def test_copied_blocks_continue_as_the_original_does(tiny: tuple[Path, Program], tmp_path: Path) -> None:
    model = load(tiny[1], tmp_path, Variant("kv", compute={"kv": "uint8"}))
    running = decoders.Sequences(model, 64, 2)
    (ids,) = texts(lengths=(40,))
    running.step({0: ids})
    model.copy_blocks(list(zip(running.tables[0].tolist(), running.tables[1].tolist(), strict=True)))
    running.lens[1] = 40
    both = running.step({0: [5, 9, 11], 1: [5, 9, 11]})
    np.testing.assert_array_equal(both[0], both[1])
    alone = running.step({1: [7]})[1]
    running.step({0: [8]})
    running.lens[1] -= 1
    np.testing.assert_allclose(running.step({1: [7]})[1], alone, atol=1e-5)


def test_a_step_may_want_no_logits(tiny: tuple[Path, Program], tmp_path: Path) -> None:
    import dataclasses

    model = load(tiny[1], tmp_path)
    step = model.step

    def silent(batch: Any) -> Any:
        return step(dataclasses.replace(batch, logit_rows=np.zeros(0, np.int64)))

    (ids,) = texts(lengths=(20,))
    running = decoders.Sequences(model, 64, 1)
    model.step = silent
    assert running.step({0: ids[:13]})[0].shape == (0, decoders.VOCABULARY)
    model.step = step
    last = running.step({0: ids[13:]})[0]
    np.testing.assert_allclose(last, decoders.logits_of(decoders.reference(tiny[0]), ids)[-1:], **CLOSE)


@pytest.mark.parametrize(
    ("variant", "limit"),
    [
        (Variant("int8", weights=Precision.INT8), 0.06),
        (Variant("int4", weights=Precision.INT4, block_size=32, keep=("lm_head",)), 0.7),
        (Variant("w8a8", weights=Precision.INT8, activations=Precision.INT8, dynamic=True), 0.12),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_quantized_decoders_stay_near_the_float_one(
    variant: Variant, limit: float, tiny: tuple[Path, Program], tmp_path: Path
) -> None:
    folder, program = tiny
    program = Quantize()(program, Context(tmp_path, Silent(), variant=variant))
    model = load(program, tmp_path, variant)
    (ids,) = texts(lengths=(60,))
    (logits,) = decoders.chunked_logits(model, [ids])
    expected = decoders.logits_of(decoders.reference(folder), ids)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < limit


def test_every_setting_is_named(tiny: tuple[Path, Program], tmp_path: Path) -> None:
    variant = Variant("int8", compute={"float": "float32", "dynamic_group": 64, "kv": "uint8"})
    assert build(tiny[1], variant, tmp_path)[1].notes == ("float=float32", "dynamic_group=64", "streams=1", "kv=uint8")


def test_another_float_for_keys_and_values_is_refused(tiny: tuple[Path, Program], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="float16") as caught:
        build(tiny[1], Variant("odd", compute={"kv": "float16"}), tmp_path)
    assert "uint8" in caught.value.fix


def test_a_closed_decoder_says_so(tiny: tuple[Path, Program], tmp_path: Path) -> None:
    model = load(tiny[1], tmp_path)
    model.close()
    with pytest.raises(BackendError, match="closed"):
        decoders.Sequences(model, 32, 1).step({0: [3]})


@pytest.mark.shared
def test_greedy_tokens_are_those_of_transformers_generate(shared: Path, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    folder = shared / "models" / "tiny-medllama"
    model = load(decoders.simplified(folder), tmp_path, blocks=64)
    reference = decoders.reference(folder)
    lines = (shared / "data/text/medquad_sample.jsonl").read_text().splitlines()[:8]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(json.loads(line)["question"]).ids[:50] for line in lines]
    new, count = 24, len(prompts)
    with torch.inference_mode():
        expected = [
            reference.generate(torch.tensor([p]), max_new_tokens=new, do_sample=False, eos_token_id=None)[0, len(p) :]
            for p in prompts
        ]
    running = decoders.Sequences(model, 96, count)
    written: list[list[int]] = [[] for _ in prompts]
    near_ties = 0
    tick = 0
    while any(len(w) < new for w in written):
        tick += 1
        # Sequence i joins at tick 2i, its prompt in two chunks, and leaves when it is done.
        batch: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            if tick == 2 * i + 1:
                batch[i] = prompt[: len(prompt) // 2]
            elif tick == 2 * i + 2:
                batch[i] = prompt[len(prompt) // 2 :]
            elif tick > 2 * i + 2 and len(written[i]) < new:
                batch[i] = written[i][-1:]
        for i, logits in running.step(batch).items() if batch else ():
            if tick > 2 * i + 1:
                best = np.sort(logits[0])[-2:]
                near_ties += bool(best[1] - best[0] < 1e-3)
                written[i].append(int(logits[0].argmax()))
    assert near_ties == 0, "choose other prompts: these don't tell"
    assert written == [e.tolist() for e in expected]
