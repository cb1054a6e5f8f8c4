"""A build that searches: from a recipe with optimize to a bundle that says what was found, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file

import medcompile
from medcompile import bundle
from medcompile.errors import DataError, RecipeError
from medcompile.search import record
from medcompile.spec import Verdict
from tests import tiny
from tests.tiny import Events

BUDGET = {"cosine": {"max_drop": 0.2}}


def written(root: Path, **sections: Any) -> Path:
    """A recipe with optimize, its model and data of three roles."""
    recipe = tiny.write_workshop(root)
    tiny.write_data(root / "calibration", "tuning", tiny.records(40, 3), role="tuning")
    keys = {"optimize": "latency", "tuning": {"data": "tuning"}, "variants": None, "budget": BUDGET, "name": "found"}
    document = tiny.recipe(**keys, **sections)
    path = recipe.with_name("found.yaml")
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bundle.Bundle]:
    """Recipe, cache and bundle of one search."""
    root = tmp_path_factory.mktemp("search")
    recipe = written(root)
    return recipe, root / "cache", medcompile.build(recipe, out=root / "out", cache_folder=root / "cache")


def test_the_bundle_holds_what_was_found_beside_float32(searched: tuple[Path, Path, bundle.Bundle]) -> None:
    _, _, found = searched
    (search,) = record.read(found.root / record.FILE)
    assert set(found.variants) == {"fp32", "optimized"} and search.variant == "optimized"
    chosen = search.point(search.chosen)
    assert chosen.variant == found.variants["optimized"]
    cost = {p.name: p.cost for p in search.points}
    assert chosen.cost is not None and chosen.cost <= max(c for c in cost.values() if c is not None)
    assert search.looks[-1].accepted and len(search.looks) <= search.most_looks
    (optimized,) = (a for a in found.artifacts if a.variant == "optimized")
    assert optimized.verdict is Verdict.NON_INFERIOR
    assert optimized.evidence[0].confidence == pytest.approx(1 - 0.05 / 3)
    assert {p.formats.get("float", 0) for p in search.points} >= {0}
    with medcompile.load(found.root) as session:
        assert session.embed(["no known words"]).shape == (1, tiny.HIDDEN)


def test_searching_again_runs_nothing_and_finds_the_same(
    searched: tuple[Path, Path, bundle.Bundle], tmp_path: Path
) -> None:
    recipe, cache, found = searched
    events = Events()
    again = medcompile.build(recipe, out=tmp_path / "out", cache_folder=cache, progress=events)
    assert events.began == []
    assert again.variants == found.variants


def test_the_found_recipe_builds_the_same_graphs_without_a_search(
    searched: tuple[Path, Path, bundle.Bundle], tmp_path: Path
) -> None:
    recipe, cache, found = searched
    fixed = recipe.with_name("fixed.yaml")
    fixed.write_bytes((found.root / "recipe.found.yaml").read_bytes())
    built = medcompile.build(fixed, out=tmp_path / "out", cache_folder=cache)
    graphs = [path for path in found.files if path.startswith("graphs/")]
    assert graphs and {p: built.files[p].sha256 for p in graphs} == {p: found.files[p].sha256 for p in graphs}
    assert record.FILE not in built.files


def test_the_data_of_the_three_roles_stand_in_the_provenance(searched: tuple[Path, Path, bundle.Bundle]) -> None:
    _, _, found = searched
    roles = [found.provenance[key] for key in ("calibration", "tuning", "evaluation")]
    assert [r["role"] for r in roles] == ["calibration", "tuning", "acceptance"]
    assert len({r["digest"] for r in roles}) == 3


def test_tuning_items_that_stand_in_the_evaluation_data_are_left_out(tmp_path: Path) -> None:
    recipe = written(tmp_path)
    items = [*tiny.records(40, 2)[:5], *tiny.records(40, 3)]
    tiny.write_data(tmp_path / "calibration", "tuning", items, role="tuning")
    events = Events()
    found = medcompile.build(recipe, out=tmp_path / "out", cache_folder=tmp_path / "cache", progress=events)
    assert found.provenance["tuning"]["items"] == 40
    assert any("5 tuning items also stand in the evaluation data" in note for note in events.notes)


def test_data_that_is_kept_for_acceptance_is_not_tuned_on(tmp_path: Path) -> None:
    recipe = written(tmp_path, **{})
    tiny.write_data(tmp_path / "calibration", "tuning", tiny.records(40, 3), role="acceptance")
    with pytest.raises(DataError, match="tuning would look at it many times"):
        medcompile.build(recipe, out=tmp_path / "out", cache_folder=tmp_path / "cache")


def test_what_was_tuned_on_does_not_accept(tmp_path: Path) -> None:
    recipe = written(tmp_path, evaluation={"data": "tuning"})
    with pytest.raises(DataError, match="accepted on other data"):
        medcompile.build(recipe, out=tmp_path / "out", cache_folder=tmp_path / "cache")


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"variants": {"fp32": {}}}, "variants are listed too"),
        ({"tuning": None}, "missing key 'tuning'"),
        ({"calibration": None}, "missing key 'calibration'"),
        ({"optimize": None}, "tuning goes with optimize"),
    ],
)
def test_a_recipe_says_what_optimize_goes_with(tmp_path: Path, sections: dict[str, Any], told: str) -> None:
    recipe = written(tmp_path)
    document = yaml.safe_load(recipe.read_text()) | sections
    recipe.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}, sort_keys=False))
    with pytest.raises(RecipeError, match=told):
        medcompile.build(recipe, out=tmp_path / "out", cache_folder=tmp_path / "cache")


def test_size_is_searched_by_bytes(tmp_path: Path) -> None:
    recipe = written(tmp_path, search={"confirmations": 1})
    found = medcompile.build(recipe, out=tmp_path / "out", cache_folder=tmp_path / "cache", overrides=["optimize=size"])
    (search,) = record.read(found.root / record.FILE)
    sizes = {p.name: p.size_bytes for p in search.points}
    assert all(p.cost == p.size_bytes for p in search.points)
    assert sizes[search.chosen] < max(sizes.values())


def test_a_planted_bad_layer_is_kept_in_float_and_named_in_the_report(tmp_path: Path) -> None:
    recipe = written(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    layer = "bert.encoder.layer.1"
    # A channel that is always 1, with a weight that dwarfs all others, and a bias that takes its part away again: in
    # float nothing is changed, in integers nothing is left of the rest.
    tensors[f"{layer}.attention.output.LayerNorm.weight"][3] = 0.0
    tensors[f"{layer}.attention.output.LayerNorm.bias"][3] = 1.0
    tensors[f"{layer}.intermediate.dense.weight"][:, 3] = 2000.0
    tensors[f"{layer}.intermediate.dense.bias"] -= 2000.0
    save_file(tensors, path, metadata={"format": "pt"})
    found = medcompile.build(
        recipe,
        out=tmp_path / "out",
        cache_folder=tmp_path / "cache",
        overrides=["optimize=size", "budget.cosine.max_drop=0.01", "search.confirmations=1"],
    )
    (search,) = record.read(found.root / record.FILE)
    planted = "encoder.layer.1.intermediate.dense/MatMul"
    by_node = {node: choice for choice in search.layers for node in choice.nodes}
    assert by_node[planted].format == "float"
    quantized = {choice.format for choice in search.layers} - {"float"}
    assert quantized
    ruined = min(a.error for a in by_node[planted].alternatives if a.format in quantized)
    assert ruined > 5 * max(choice.error for choice in search.layers)
    assert planted in (found.root / "report.html").read_text(encoding="utf-8")
    assert "alone would move the outputs by" in by_node[planted].why
