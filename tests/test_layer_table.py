"""The layer table: names of many layers in few words, and rows as the bundle's file has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medcompile import layer_table
from medcompile.errors import BundleError
from tests.bundles import contents, write


def test_names_that_differ_in_one_number_become_one_with_ranges() -> None:
    names = [f"encoder.layer.{i}.output.dense" for i in (0, 1, 2, 5, 11)]
    assert layer_table.folded(names) == "encoder.layer.0-2,5,11.output.dense"


def test_numbers_that_vary_together_are_stars() -> None:
    assert layer_table.folded(["blocks.0.norm1", "blocks.1.norm2"]) == "blocks.*.norm*"


def test_names_alone_and_names_of_other_patterns_stay_as_they_are() -> None:
    assert layer_table.groups(["a.01", "classifier", "b.1.x", "b.2.x"]) == ["a.01", "classifier", "b.1-2.x"]


def test_a_node_that_dynamic_int8_renamed_has_its_old_name(tmp_path: Path) -> None:
    row = {"name": "dense/MatMul/integer", "op": "MatMulInteger", "precision": "int8 x int8, scales at run time"}
    table = json.dumps({"fp32": {"embed": [row]}})
    found = write(tmp_path / "b", contents(), files={"layers.json": table})
    assert layer_table.read(found)["fp32"]["embed"][0]["name"] == "dense/MatMul"


@pytest.mark.parametrize("text", ["nonsense", "[1]", '{"fp32": {"embed": [{"op": "Add"}]}}', '{"fp32": 3}'])
def test_a_table_that_is_none_is_a_bundle_error(tmp_path: Path, text: str) -> None:
    found = write(tmp_path / "b", contents(), files={"layers.json": text})
    with pytest.raises(BundleError, match=r"layers\.json"):
        layer_table.read(found)
