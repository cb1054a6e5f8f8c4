"""Groups of items: columns of the data that a budget may ask the worst part of."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from medcompile import data
from medcompile.errors import DataError
from tests.data.test_read import TAGS, TEXT, manifest

GROUPS = {"site": "hospital", "sex": "gender"}


def test_jsonl_and_csv_items_carry_their_groups(tmp_path: Path) -> None:
    row = json.dumps({"text": "No fever.", "hospital": "north", "gender": 1}) + "\n"
    for kind, content in (("jsonl", row), ("csv", "gender,text,hospital\n1,No fever.,north\n")):
        (item,) = data.read(manifest(tmp_path, kind, TEXT, content, groups=GROUPS)).items
        assert item.groups == (("sex", "1"), ("site", "north"))


def test_rows_of_an_npz_and_lines_of_an_index_carry_their_groups(tmp_path: Path) -> None:
    arrays = io.BytesIO()
    np.savez(arrays, images=np.zeros((2, 4, 4), np.uint8), scanner=np.array([7, 8]))
    found = data.read(manifest(tmp_path, "npz", {"image": "images"}, arrays.getvalue(), groups={"device": "scanner"}))
    assert [item.groups for item in found.items] == [(("device", "7"),), (("device", "8"),)]
    (tmp_path / "a.png").write_bytes(b"pixels")
    keys = {"path": ["index.csv"], "groups": {"device": "scanner"}}
    (tmp_path / "index.csv").write_text("file,scanner\na.png,CT\n")
    made = manifest(tmp_path, "images", {"image": "file"}, "file,scanner\na.png,CT\n", **keys)
    assert data.read(made).items[0].groups == (("device", "CT"),)


def test_groups_are_part_of_the_digest_of_the_data_and_not_of_the_items(tmp_path: Path) -> None:
    rows = "hospital,gender,text\nnorth,f,No fever.\n"
    with_groups = data.read(manifest(tmp_path, "csv", TEXT, rows, groups=GROUPS))
    without = data.read(manifest(tmp_path, "csv", TEXT, rows))
    moved = data.read(manifest(tmp_path, "csv", TEXT, rows.replace("north", "south"), groups=GROUPS))
    assert len({with_groups.digest, without.digest, moved.digest}) == 3
    assert with_groups.items[0].digest == without.items[0].digest


def test_a_group_that_is_not_there_is_told_by_its_key(tmp_path: Path) -> None:
    for kind, content in (("jsonl", '{"text": "x", "gender": "f"}\n'), ("csv", "text,gender\nx,f\n")):
        with pytest.raises(DataError, match=r"'hospital', which groups\.site names"):
            data.read(manifest(tmp_path, kind, TEXT, content, groups=GROUPS))
    with pytest.raises(DataError, match=r"groups\.site is neither text nor a whole number"):
        data.read(manifest(tmp_path, "jsonl", TEXT, '{"text": "x", "hospital": 1.5, "gender": "f"}\n', groups=GROUPS))


def test_conll_has_no_groups_and_names_are_plain(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="conll has no column that could hold groups"):
        manifest(tmp_path, "conll", TAGS, "No\tO\n", groups=GROUPS)
    with pytest.raises(DataError, match="no name of a group"):
        manifest(tmp_path, "csv", TEXT, "text\nx\n", groups={"site]": "hospital"})
