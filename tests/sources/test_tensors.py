"""The safetensors table: places, shards, tied and old names, and headers that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from safetensors.torch import save_model as save_tied

from medcompile.sources import resolve, tensors
from tests.sources.reading import fault


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
