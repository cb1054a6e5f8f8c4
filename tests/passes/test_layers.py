"""The layer table: which operator computes in which precision, as `medcompile inspect` shows it."""

from __future__ import annotations

import pytest

from medcompile.passes.layers import layers
from medcompile.spec import Precision
from tests import tiny
from tests.passes.test_cast import TASK, lowered


def linears(kind: str, precision: Precision) -> list[str]:
    rows = layers(lowered(kind, precision).graphs[TASK].model)
    return [r["precision"] for r in rows if r["op"] in ("MatMul", "MatMulInteger") and "self/" not in r["name"]]


@pytest.mark.parametrize(
    ("kind", "precision", "words"),
    [
        ("float", Precision.FLOAT32, "float32"),
        ("float", Precision.FLOAT16, "float16"),
        ("static", Precision.FLOAT32, "int8 x int8"),
        ("static", Precision.FLOAT16, "int8 x int8"),
        ("dynamic", Precision.FLOAT32, "int8 x int8, scales at run time"),
        ("int4", Precision.FLOAT16, "float16 x int4 weights"),
    ],
)
def test_every_linear_layer_says_its_precision(kind: str, precision: Precision, words: str) -> None:
    assert linears(kind, precision) == [words] * (6 * tiny.LAYERS + 1)


def test_operators_that_compute_nothing_are_left_out() -> None:
    rows = layers(lowered("static", Precision.FLOAT16).graphs[TASK].model)
    assert not {r["op"] for r in rows} & {"QuantizeLinear", "DequantizeLinear", "Cast", "Reshape", "Shape", "Range"}
    assert {r["precision"] for r in rows if r["op"] in ("Softmax", "LayerNormalization")} == {"float32"}
    assert {r["precision"] for r in rows if r["op"] == "Gelu"} == {"float16"}
