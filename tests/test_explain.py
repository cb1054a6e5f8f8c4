"""Explain: the reason of every layer's precision, from a search's record or from the recipe's rules."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from medcompile import bundle
from medcompile.bundle import Bundle
from medcompile.errors import BundleError, UsageError
from medcompile.explain import Explanation, explain, folded
from medcompile.search import record
from medcompile.search.record import Alternative, LayerChoice, Look, Point, Search
from medcompile.spec import LayerRule, Precision, Variant, Verdict
from tests.bundles import artifact, contents, evidence, write
from tests.command_line import call
from tests.tiny import Workshop

BAD = "encoder.layer.2.output.dense/MatMul"


def choice(name: str, format: str, error: float, why: str, **others: tuple[float, float]) -> LayerChoice:
    alternatives = tuple(Alternative(f, *numbers) for f, numbers in others.items())
    return LayerChoice("embed", (name,), format, error, alternatives, why)


def searched(**changes: Any) -> Search:
    """A search in which one layer of four was kept in float."""
    int8 = [
        choice(
            f"encoder.layer.{i}.output.dense/MatMul",
            "int8",
            0.001 * (i + 1),
            f"the cheapest format; alone it moves the outputs by {0.1 * (i + 1):.2f}%, which the budget bears",
            float=(0.0, 0.1 + i / 100),
        )
        for i in (0, 1, 3)
    ]
    bad = choice(BAD, "float", 0.0, "int8 alone would move the outputs by 40%, too much", int8=(0.4, -0.11))
    variant = Variant("found", weights=Precision.INT8, activations=Precision.INT8, layers=(LayerRule(BAD),))
    points = (
        Point(
            "all int8", variant, {"int8": 4}, 1.0, 1.1, 9_000_000, 0.41, evidence(Verdict.INFERIOR), False, "too much"
        ),
        Point("3 of 4", variant, {"int8": 3, "float": 1}, None, 1.2, 9_500_000, 0.01, (), True, "passed on tuning"),
    )
    look = Look(1, "3 of 4", (0.983,), evidence(Verdict.NON_INFERIOR), True)
    made = {
        "target": "fake-cpu",
        "objective": "latency",
        "basis": "measured on this machine",
        "reference": "fp32",
        "points": points,
        "layers": (*int8, bad),
        "looks": (look,),
        "most_looks": 3,
        "chosen": "3 of 4",
        "variant": "int8-found",
        "seconds": 61.0,
        "notes": ("one candidate was refused by the target",),
    }
    fields = inspect.signature(Search).parameters  # those that the record has besides are numbers
    made |= {n: 1.0 for n, f in fields.items() if n not in made and f.default is inspect.Parameter.empty}
    return Search(**made | changes)


def with_search(tmp_path: Path, *searches: Search) -> Bundle:
    record.write(tmp_path / "search.json", searches)
    what = contents([artifact("fp32"), artifact("int8-found", Verdict.NON_INFERIOR, 1.0)])
    row = {"name": BAD, "op": "MatMul", "precision": "float32"}
    table = {variant: {"embed": [row]} for variant in ("fp32", "int8-found")}
    files = {record.FILE: (tmp_path / "search.json").read_text(), "layers.json": json.dumps(table)}
    return write(tmp_path / "b", what, files=files)


# ---- a search


def test_choices_that_differ_in_figures_alone_are_one_row() -> None:
    rows = folded(searched().layers)
    assert [(r.layers, r.groups, r.format) for r in rows] == [
        (("encoder.layer.0-1,3.output.dense/MatMul",), 3, "int8"),
        ((BAD,), 1, "float"),
    ]
    assert rows[0].error == (0.001, 0.004) and not rows[0].alike and rows[1].alike
    (other,) = rows[0].alternatives
    assert (other.format, other.cost) == ("float", pytest.approx((0.1, 0.13)))


def test_the_layer_that_was_kept_in_float_is_named_with_what_int8_would_do(tmp_path: Path) -> None:
    done = call("explain", with_search(tmp_path, searched()).root)
    assert done.exit_code == 0
    for part in ("encoder.layer.0-1,3.output.dense", "layer.2.output.dense", "too much", "-0.110 ms", "error 40.000%"):
        assert part in done.stdout
    for part in (
        "3 of 4 (found)",
        "1.200 ms predicted",
        "passed on tuning",
        "1 of 3",
        "accepted",
        "0.95",
        "refused by",
    ):
        assert part in done.stdout


def test_layer_shows_each_by_itself_and_nothing_else(tmp_path: Path) -> None:
    done = call("explain", with_search(tmp_path, searched()).root, "--layer", "encoder.layer.[01].*")
    assert "encoder.layer.0.output" in done.stdout and "encoder.layer.1.output" in done.stdout
    assert "layer.2" not in done.stdout and "what was tried" not in done.stdout
    found = explain(bundle.read(tmp_path / "b"), BAD)
    assert [c.nodes for c in found.searches[0].layers] == [(BAD,)]
    assert [(r.variant, r.layers) for r in found.rules] == [("int8-found", (BAD,))]
    assert explain(bundle.read(tmp_path / "b")).rules == ()


def test_a_search_that_found_nothing_says_so(tmp_path: Path) -> None:
    done = call("explain", with_search(tmp_path, searched(chosen="", variant="")).root)
    assert "none was confirmed" in done.stdout


def test_costs_of_a_search_for_size_are_bytes(tmp_path: Path) -> None:
    bad = choice(BAD, "float", 0.0, "kept", int8=(0.4, -2_500_000.0))
    done = call("explain", with_search(tmp_path, searched(objective="size", layers=(bad,))).root)
    assert "-2.500 MB" in done.stdout


def test_json_holds_the_whole_record(tmp_path: Path) -> None:
    told = json.loads(call("explain", with_search(tmp_path, searched()).root, "--json").stdout)
    assert told["schema_version"] == 1
    assert len(told["searches"][0]["layers"]) == 4 and told["searches"][0]["layers"][3]["nodes"] == [BAD]


def test_a_record_that_cannot_be_read_is_a_bundle_error(tmp_path: Path) -> None:
    found = write(tmp_path / "b", contents(), files={record.FILE: "[]"})
    with pytest.raises(BundleError, match=r"search\.json"):
        explain(dataclasses.replace(found, files=found.files))


# ---- rules


def ruled(tmp_path: Path, variant: Variant, rows: list[tuple[str, str, str]]) -> dict[str, str]:
    """By layer, the rule that holds, of a bundle with fp32 and that variant."""
    table = {
        "fp32": {"embed": [{"name": n, "op": op, "precision": "float32"} for n, op, _ in rows if "scale" not in n]},
        "int8": {"embed": [{"name": n, "op": op, "precision": p} for n, op, p in rows]},
    }
    what = contents([artifact("fp32"), artifact("int8")])
    what = dataclasses.replace(what, variants={**what.variants, "int8": dataclasses.replace(variant, name="int8")})
    found = explain(write(tmp_path / "b", what, files={"layers.json": json.dumps(table)}))
    return {layer: r.why for r in found.rules if r.variant == "int8" for layer in r.layers}


W8A8 = Variant("int8", weights=Precision.INT8, activations=Precision.INT8)
ROWS = [
    ("a.dense/MatMul", "MatMul", "int8 x int8"),
    ("b.dense/MatMul", "MatMul", "float32"),
    ("b.self/MatMul", "MatMul", "float32"),
    ("b/Softmax", "Softmax", "float32"),
    ("x/row_scale", "Mul", "float32"),
]


def test_each_layers_rule_is_found_again(tmp_path: Path) -> None:
    why = ruled(tmp_path, dataclasses.replace(W8A8, keep=("b.dense",)), ROWS)
    assert why["a.dense/MatMul"] == "the variant's own format: weights int8, activations int8"
    assert why["b.dense/MatMul"] == "keep: b.dense"
    assert "product of two activations" in why["b.self/MatMul"]
    assert why["b/Softmax"] == "the variant's float: float32"
    assert "put in by quantization" in why["x/row_scale"]


def test_rules_for_layers_are_named_by_their_pattern(tmp_path: Path) -> None:
    rules = (LayerRule("a.*", Precision.INT8, Precision.INT8, dynamic=True), LayerRule("b.dense"))
    why = ruled(tmp_path, Variant("int8", layers=rules), ROWS)
    assert why["a.dense/MatMul"] == "layers: a.*: weights int8, activations int8, scales at run time"
    assert why["b.dense/MatMul"] == "layers: b.dense: in float"
    assert why["b.self/MatMul"] == "no rule of layers names it"


def test_sixteen_bits_leave_some_operators_in_float32(tmp_path: Path) -> None:
    rows = [("a/MatMul", "MatMul", "float16"), ("b/Softmax", "Softmax", "float32"), ("c/MatMul", "MatMul", "float32")]
    why = ruled(tmp_path, Variant("int8", float_dtype=Precision.FLOAT16, keep=("c",)), rows)
    assert why["a/MatMul"] == "the variant's float: float16"
    assert "always stays in float32" in why["b/Softmax"]
    assert why["c/MatMul"] == "keep: c"


def test_what_a_backend_computes_in_is_told_beside_what_the_graph_says(tmp_path: Path) -> None:
    why = ruled(tmp_path, Variant("int8", compute={"float": "bfloat16"}), [("b/Softmax", "Softmax", "float32")])
    assert why["b/Softmax"] == "the variant's float: float32, computed in bfloat16"


def test_a_variant_for_other_graphs_says_so(tmp_path: Path) -> None:
    why = ruled(tmp_path, dataclasses.replace(W8A8, graphs=("fill-mask",)), [("a/MatMul", "MatMul", "float32")])
    assert why == {"a/MatMul": "graphs: the variant is for fill-mask alone"}


def test_a_built_bundle_explains_itself(small: Workshop) -> None:
    done = call("explain", small.bundle)
    assert done.exit_code == 0
    for part in ("encoder.layer.0-1.output.dense", "weights int8, activations int8", "no search was made"):
        assert part in done.stdout
    found: Explanation = explain(bundle.read(small.bundle), "encoder.layer.1.output.dense")
    assert {n for r in found.rules for n in r.layers} == {
        "encoder.layer.1.output.dense/MatMul",
        "encoder.layer.1.output.dense/Add",
    }


def test_a_layer_that_is_not_there_is_refused_with_some_that_are(small: Workshop) -> None:
    with pytest.raises(UsageError, match=r"no layer 'decoder\.\*'") as caught:
        explain(bundle.read(small.bundle), "decoder.*")
    assert "use names such as" in caught.value.fix
    done = call("explain", small.bundle, "--layer", "decoder.*")
    assert done.exit_code == 2 and "fix: " in done.stderr
