"""Embeddings in int8: rows come back within a step of their own, and only tables of tokens are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medcompile.errors import QuantizeError
from medcompile.passes.embeddings import quantize_embeddings
from medcompile.passes.quantize import Quantize
from medcompile.spec import Precision, Variant
from tests.passes import gated, two_layers


def test_every_row_comes_back_within_half_a_step_of_its_own_scale() -> None:
    program = gated.program()
    model = program.graphs["generate"].model
    table = model.graph.initializers["embed.weight"].const_value.numpy()
    quantize_embeddings(model)
    (batch,) = gated.feeds(1)
    rows = next(gated.values(model, [batch], ("embed/Gather/scaled/output",)))["embed/Gather/scaled/output"]
    exact = table[batch["input_ids"]]
    assert (np.abs(rows - exact) <= np.abs(exact).max(1, keepdims=True) / 127 * 0.5001).all()
    assert not np.array_equal(rows, exact)


def test_the_float_table_leaves_the_graph(tmp_path: Path) -> None:
    variant = Variant("int8", weights=Precision.INT8, embeddings=Precision.INT8)
    model = Quantize()(gated.program(), gated.context(tmp_path, variant)).graphs["generate"].model
    assert "embed.weight" not in model.graph.initializers
    assert model.graph.initializers["embed.weight/int8"].const_value.numpy().dtype == np.int8


def test_logits_stay_close(tmp_path: Path) -> None:
    variant = Variant("int8", weights=Precision.INT8, embeddings=Precision.INT8)
    exact = gated.logits(gated.program())
    made = gated.logits(Quantize()(gated.program(), gated.context(tmp_path, variant)))
    assert np.linalg.norm(made - exact) < 0.08 * np.linalg.norm(exact)


def test_a_graph_without_tokens_is_refused() -> None:
    model = two_layers.program().graphs["tiny"].model
    model.graph.inputs[0].name = "pixels"
    with pytest.raises(QuantizeError, match="looks up no tokens"):
        quantize_embeddings(model)
