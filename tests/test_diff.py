"""Diff: every kind of change is found and told as that kind, and what can't be compared is said."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medcompile import bundle
from medcompile.bundle import Bundle, Contents
from medcompile.diff import Change, budget, changes, counted, diff
from medcompile.spec import Margin, Verdict
from tests.bundles import CPU, artifact, contents, write
from tests.command_line import call
from tests.tiny import Workshop

LAYER = "encoder.layer.1.intermediate.dense"


def known(**provenance: Any) -> Contents:
    """Contents with that provenance, and evaluation data of one digest unless it says otherwise."""
    data = {"evaluation": {"name": "held-out", "digest": "e" * 64, "items": 40, "role": "acceptance"}}
    return dataclasses.replace(contents(), provenance=data | provenance)


def pair(tmp_path: Path, a: Contents, b: Contents, **files: tuple[str, str]) -> tuple[Bundle, Bundle]:
    """files: by a path with _ for every dot, what a and b hold there."""
    sides = ({name.replace("_", "."): texts[i] for name, texts in files.items()} for i in (0, 1))
    return write(tmp_path / "a", a, files=next(sides)), write(tmp_path / "b", b, files=next(sides))


@pytest.fixture(scope="module")
def retrained(small: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a checkpoint in which one layer's weight was doubled in its first row."""
    from safetensors.numpy import load_file, save_file

    other = small.copy(tmp_path_factory.mktemp("retrained"))
    file = other.root / "model/model.safetensors"
    tensors = load_file(file)
    tensors[f"bert.{LAYER}.weight"][0] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    other.build()
    return other.bundle


def test_keys_are_dotted_where_mappings_are_nested_and_lists_are_whole() -> None:
    a = {"model": {"tasks": ["embed"], "source": "x"}, "kv": {}, "same": 1}
    b = {"model": {"tasks": ["embed", "text"], "source": "x"}, "new": {"deep": 2}, "same": 1}
    assert changes(a, b) == (
        Change("model.tasks", ["embed"], ["embed", "text"]),
        Change("kv", {}, None),
        Change("new.deep", None, 2),
    )


def test_recipes_data_versions_and_budgets_are_compared_key_by_key(tmp_path: Path) -> None:
    recipes = [yaml.safe_dump({"calibration": {"samples": n}, "targets": ["fake-cpu"]}) for n in (64, 256)]
    calibration = {"digest": "1" * 64, "items": 64, "role": "calibration"}
    a = known(versions={"onnx": "1.23", "torch": "2.15"}, calibration=calibration)
    b = known(versions={"onnx": "1.24", "torch": "2.15"}, calibration=calibration | {"items": 256})
    b = dataclasses.replace(b, budget=(Margin("f1", 0.02),))
    found = diff(*pair(tmp_path, a, b, recipe_resolved_yaml=(recipes[0], recipes[1])))
    assert found.recipe == (Change("calibration.samples", 64, 256),)
    assert found.versions == (Change("built with.onnx", "1.23", "1.24"),)
    assert found.data == (Change("calibration.items", 64, 256),)
    assert found.budget == (Change("f1.max_drop", 0.01, 0.02),)
    assert found.same_items and not found.identical
    assert counted(found.files) == {("recipe.resolved.yaml", "changed"): 1}


def test_what_only_one_bundle_has_is_noted(tmp_path: Path) -> None:
    other = dataclasses.replace(CPU, name="other-cpu")
    rows = [artifact("int8", graph=task, target=other) for task in ("embed", "fill-mask")]
    b = dataclasses.replace(contents(rows, ("embed", "fill-mask")), provenance={})
    found = diff(*pair(tmp_path, known(), b))
    told = "; ".join(found.notes)
    for part in ("graph fill-mask is only in b", "variant fp32 is only in a", "target other-cpu is only in b"):
        assert part in told
    assert "different evaluation data" in told and not found.same_items
    assert "a holds no recipe.resolved.yaml" in told and "b holds no recipe.resolved.yaml" in told


def test_the_budget_is_the_recipes_and_not_what_a_search_tested_at(tmp_path: Path) -> None:
    recipe = yaml.safe_dump({"budget": {"f1": {"max_drop": 0.01, "confidence": 0.95}}})
    searched = dataclasses.replace(known(), budget=(Margin("f1", 0.01, 0.983),))
    a, b = pair(tmp_path, known(), searched, recipe_resolved_yaml=(recipe, recipe))
    assert budget(b) == (Margin("f1", 0.01, 0.95),) and diff(a, b).budget == ()


def test_precision_by_layer_is_grouped_by_what_became_of_it(tmp_path: Path) -> None:
    def table(precisions: dict[str, str]) -> str:
        rows = [{"name": name, "op": "MatMul", "precision": p} for name, p in precisions.items()]
        return json.dumps({"fp32": {"embed": rows}})

    before = {f"layer.{i}.dense/MatMul": "int8 x int8" for i in range(4)} | {"gone/MatMul": "float32"}
    after = {f"layer.{i}.dense/MatMul": "float32" if i == 2 else "int8 x int8" for i in range(4)}
    found = diff(*pair(tmp_path, known(), known(), layers_json=(table(before), table(after))))
    assert [(p.a, p.b, p.layers) for p in found.precision] == [
        ("int8 x int8", "float32", ("layer.2.dense/MatMul",)),
        ("float32", "", ("gone/MatMul",)),
    ]


def test_recorded_metrics_sizes_and_latencies_stand_side_by_side(tmp_path: Path) -> None:
    a = dataclasses.replace(known(), artifacts=(artifact("fp32", Verdict.NON_INFERIOR, 4.0),))
    b = dataclasses.replace(known(), artifacts=(artifact("fp32", Verdict.INFERIOR, 2.0),))
    found = diff(*pair(tmp_path, a, b))
    (row,) = found.metrics
    assert (row.metric, row.a and row.a.verdict, row.b and row.b.verdict) == ("f1", "non-inferior", "inferior")
    (built,) = found.artifacts
    assert built.a is not None and built.b is not None
    assert (built.a.latency_ms, built.b.latency_ms, built.a.size_bytes) == (4.0, 2.0, 28)
    assert "fake 1.0" in built.a.machine and "x86_64" in built.a.machine


def test_a_changed_layer_is_named_with_how_much_of_it_changed(small: Workshop, retrained: Path) -> None:
    found = diff(bundle.read(small.bundle), bundle.read(retrained))
    assert [c.key for c in found.source] == ["files.model.safetensors"]
    (weight,) = [w for w in found.weights or () if w.variant == "fp32"]
    assert LAYER in weight.name and weight.a == weight.b == "float32[32, 64]"
    assert (weight.elements, weight.changed) == (32 * 64, 32)
    assert weight.relative == pytest.approx(1 / np.sqrt(64), rel=0.5)
    # In int8 the layers behind it have other ranges, and so other numbers; no layer's type changed.
    assert any(LAYER in w.name for w in found.weights or () if w.variant == "int8")
    assert all(w.a == w.b for w in found.weights or ()) and found.precision == ()


def test_without_onnx_ir_weights_are_compared_by_digest(
    small: Workshop, retrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    found = diff(bundle.read(small.bundle), bundle.read(retrained))
    assert found.weights is None and any("digests of their files alone" in note for note in found.notes)
    assert counted(found.files)["graphs/fp32/", "changed"] == 1


# ---- the command


def test_identical_bundles_are_told_in_one_line(small: Workshop) -> None:
    done = call("diff", small.bundle, small.bundle)
    assert done.exit_code == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1 and "identical" in done.stdout
    told = json.loads(call("diff", small.bundle, small.bundle, "--json").stdout)
    assert told["identical"] is True and told["schema_version"] == 1 and told["paired"]["pairs"] == []


def test_diff_shows_what_changed_and_what_did_not(small: Workshop, retrained: Path) -> None:
    done = call("diff", small.bundle, retrained, "--no-run")
    assert done.exit_code == 0
    for part in ("files.model.safetensors", LAYER, "32 of 2,048", "the same in both: recipe, data", "--no-run"):
        assert part in done.stdout


def test_a_bad_bundle_is_refused_as_everywhere(small: Workshop, tmp_path: Path) -> None:
    done = call("diff", small.bundle, tmp_path / "none")
    assert done.exit_code == 1 and "no such folder" in done.stderr and "fix: " in done.stderr
