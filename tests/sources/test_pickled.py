""".bin files: every tensor kept, once; pickles that want to run code refused before they do."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import tarfile
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medcompile.errors import UnsafeWeightsError
from medcompile.sources import resolve, tensors
from tests.sources.reading import fault, values


def as_bin(folder: Path, state: object, **how: Any) -> Path:
    """Put state in place of the folder's safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin", **how)
    return folder


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


def test_a_bin_gives_the_same_values_as_the_safetensors_beside_it(shared: Path, tmp_path: Path) -> None:
    origin = shared / "models" / "tiny-biomedclip"
    for name in ("open_clip_config.json", "tokenizer.json", "open_clip_pytorch_model.bin"):
        shutil.copy(origin / name, tmp_path)
    table = tensors(resolve(f"path:{tmp_path}"))
    expected = load_file(origin / "open_clip_model.safetensors")
    assert set(table) - set(expected) == {"text.transformer.embeddings.position_ids"}
    for name, tensor in expected.items():
        assert np.array_equal(values(table[name]), tensor.numpy()), name


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
