"""Bias correction: on the calibration data, quantized layers give the mean that the float ones gave."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medcompile.passes.calibrate import Calibrate, real_rows
from medcompile.passes.edits import constant
from medcompile.passes.linear import linear_groups
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Program, Silent
from medcompile.run_onnx import run_onnx
from medcompile.spec import Precision, Variant
from tests.passes import gated, two_layers

INT8, INT4 = Precision.INT8, Precision.INT4
LEFT, RIGHT, DOWN = two_layers.LAYERS
FORMATS = {
    "static": Variant("static", weights=INT8, activations=INT8),
    "smooth": Variant("smooth", weights=INT8, activations=INT8, method="smoothquant"),
    "dynamic": Variant("dynamic", weights=INT8, activations=INT8, dynamic=True),
    "int8": Variant("int8", weights=INT8),
    "int4": Variant("int4", weights=INT4),
    "blocks": Variant("blocks", weights=INT4, block_size=16),
    "awq": Variant("awq", weights=INT4, block_size=16, method="awq"),
}


def planted(*, bias: bool = False) -> Program:
    """Inputs of down, behind a Gelu, have means above zero, and its weights are all rounded down by 0.4 int8 steps."""
    arrays = two_layers.weights()
    codes = np.random.default_rng(0).integers(20, 100, arrays["down"].shape) + 0.4
    codes[0] = 127
    arrays["down"] = (codes / 100).astype(np.float32)
    program = two_layers.program(arrays)
    if bias:
        model = program.graphs["tiny"].model
        logits = model.graph.outputs[0]
        add = ir.node("Add", [logits, constant(model, "bias", np.arange(4, dtype=np.float32))], name="block/bias")
        add.outputs[0].type, add.outputs[0].shape = logits.type, logits.shape
        model.graph.append(add)
        model.graph.outputs[0] = add.outputs[0]
        logits.name, add.outputs[0].name = "product", "logits"
    return Calibrate()(program, two_layers.context())


def quantized(program: Program, variant: Variant) -> Program:
    return Quantize()(program, two_layers.context(variant=variant))


def mean_error(program: Program, exact: Program) -> float:
    return float(np.abs((two_layers.logits(program) - two_layers.logits(exact)).mean(axis=0)).max())


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_mean_error_of_a_layer_goes_away(name: str, bias: bool) -> None:
    program = planted(bias=bias)
    variant = dataclasses.replace(FORMATS[name], keep=(LEFT, RIGHT))
    plain = quantized(program, variant)
    corrected = quantized(program, dataclasses.replace(variant, bias_correction=True))
    # What is left of calibrated activations is their own rounding, which no weight explains.
    assert mean_error(corrected, program) < mean_error(plain, program) * (0.2 if variant.activations else 0.01)


def test_the_bias_that_is_there_takes_it_and_no_node_is_added() -> None:
    variant = dataclasses.replace(FORMATS["int8"], keep=(LEFT, RIGHT), bias_correction=True)
    program = planted(bias=True)
    model = quantized(program, variant).graphs["tiny"].model
    (add,) = [n for n in model.graph if n.name == "block/bias"]
    assert [n.op_type for n in model.graph].count("Add") == 2
    assert not np.array_equal(add.inputs[1].const_value.numpy(), np.arange(4))
    np.testing.assert_array_equal(program.graphs["tiny"].model.graph.initializers["bias"].const_value.numpy(), range(4))


def test_without_a_bias_an_add_of_its_own_gives_the_layers_output_by_its_name() -> None:
    variant = dataclasses.replace(FORMATS["int8"], bias_correction=True)
    model = quantized(planted(), variant).graphs["tiny"].model
    (output,) = model.graph.outputs
    assert (output.name, output.producer().op_type) == ("logits", "Add")
    assert {n.name for n in model.graph if n.op_type == "Add"} == {
        "block/Add",
        *(f"{name}/bias_corrected" for name in two_layers.LAYERS),
    }


def test_rounding_of_earlier_layers_does_not_spoil_it() -> None:
    program = planted()
    for variant in (FORMATS["int8"], FORMATS["static"]):
        corrected = quantized(program, dataclasses.replace(variant, bias_correction=True))
        assert mean_error(corrected, program) < mean_error(quantized(program, variant), program) / 2


def test_a_decoder_by_layer_keeps_its_mean_too(tmp_path: Path) -> None:
    program = gated.program()
    exact = gated.logits(program)
    shifts = {}
    for corrected in (False, True):
        variant = Variant("int4", weights=INT4, block_size=32, method="awq", bias_correction=corrected)
        made = gated.logits(Quantize()(program, gated.context(tmp_path, variant)))
        shifts[corrected] = float(np.linalg.norm((made - exact).mean(axis=0)))
    assert shifts[True] < shifts[False]


def sentences(shared: Path) -> list[dict[str, np.ndarray]]:
    """Batches of eight sentences of the NCBI disease corpus, as minilm-ner takes them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / "models/minilm-ner/tokenizer.json"))
    tokenizer.enable_padding()
    text = (shared / "data/ner/ncbi-disease/devel.tsv").read_text(encoding="utf-8")
    lines = [" ".join(line.split("\t")[0] for line in block.splitlines()) for block in text.strip().split("\n\n")]
    batches = []
    for start in range(0, 96, 8):
        encoded = tokenizer.encode_batch(lines[start : start + 8])
        ids, mask = (np.array([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return batches


def test_scales_are_folded_through_a_bias_too(tmp_path: Path) -> None:
    program, exact = gated.program(kv_heads=4), gated.logits(gated.program(kv_heads=4))
    variant = Variant("int8", weights=INT8, method="awq", bias_correction=True)
    made = Quantize()(program, gated.context(tmp_path, variant))
    assert not [n.name for n in made.graphs["generate"].model.graph if (n.name or "").endswith("/equalize")]
    assert np.linalg.norm(gated.logits(made) - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.slow
def test_trained_layers_keep_their_means_on_other_text(shared: Path) -> None:
    from tests import simplified

    task, batches = "token-classification", sentences(shared)
    fitted, held = batches[:8], batches[8:]

    def context(variant: Variant | None = None) -> Context:
        return Context(Path(), Silent(), variant, lambda _: iter(fitted), run_onnx)

    def layers(program: Program) -> list[np.ndarray]:
        """What each linear layer gives, bias included, on every real token."""
        found = list(run_onnx(program.graphs[task].model, iter(held), names))
        masks = [batch["attention_mask"] for batch in held]
        return [np.concatenate([real_rows(o[n], m) for o, m in zip(found, masks, strict=True)]) for n in names]

    program = Calibrate()(simplified.simplified_from(shared / "models/minilm-ner", task), context())
    nodes = [node for group in linear_groups(program.graphs[task].model) for node in group.nodes]
    names = tuple(str(use.node.outputs[0].name) for node in nodes for use in node.outputs[0].uses())
    exact = layers(program)
    for variant in (FORMATS["smooth"], FORMATS["int4"]):
        shifts = []
        for corrected in (False, True):
            made = Quantize()(program, context(dataclasses.replace(variant, bias_correction=corrected)))
            pairs = zip(layers(made), exact, strict=True)
            shifts.append(np.mean([np.linalg.norm((m - e).mean(0)) / np.linalg.norm(e.std(0)) for m, e in pairs]))
        assert shifts[1] < 0.75 * shifts[0], variant.name
