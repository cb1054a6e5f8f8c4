"""Quantized checkpoints become folders of floats: every weight to the last bit, and what can't be read is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import sources
from medcompile.errors import SourceError
from tests import decoders, quantized_checkpoints
from tests.quantized_checkpoints import FORMS, GPTQ, GROUPS, scheme

MLP = "model.layers.1.mlp.up_proj"


def read(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    checkpoint = sources.resolve(f"path:{folder}", cache=folder / "cache")
    assert set(sources.tensors(checkpoint)) == set(named(checkpoint.folder))
    return named(checkpoint.folder)


def named(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def change(folder: Path, **told: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= told
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_the_codes_less_zero_points_times_scales_to_the_last_bit(name: str, tmp_path: Path) -> None:
    layers = quantized_checkpoints.write(name, tmp_path)
    found = read(tmp_path)
    assert len(layers) == 14
    for layer, written in layers.items():
        np.testing.assert_array_equal(found[f"{layer}.weight"], written.weight.astype(np.float32))


def test_what_is_not_quantized_stays_as_it_is_and_shards_are_read(tmp_path: Path) -> None:
    before = named(decoders.write_checkpoint("llama", tmp_path / "float"))
    layers = quantized_checkpoints.write("awq", tmp_path / "awq", shards=3)
    found = read(tmp_path / "awq")
    assert found.keys() == before.keys()
    plain = found.keys() - {f"{layer}.weight" for layer in layers}
    assert len(plain) == 7
    for name in plain:
        assert found[name].dtype == before[name].dtype
        np.testing.assert_array_equal(found[name], before[name])


def test_transformers_loads_the_folder_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    layers = quantized_checkpoints.write("gptq-order-zeros", tmp_path)
    model = decoders.reference(sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache").folder)
    parameter = dict(model.named_parameters())[f"{MLP}.weight"]
    np.testing.assert_array_equal(parameter.detach().numpy(), layers[MLP].weight.astype(np.float32))


def test_the_folder_is_made_once_and_again_when_the_checkpoint_changes(tmp_path: Path) -> None:
    quantized_checkpoints.write("awq", tmp_path)
    first, again = (sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache") for _ in range(2))
    assert first == again
    assert len(list((tmp_path / "cache/quantized").iterdir())) == 1
    change(tmp_path, modules_to_not_convert=["lm_head"])
    other = sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    assert other.folder != first.folder
    assert other.files["quantized/config.json"] != first.files["quantized/config.json"]


def test_a_checkpoint_of_floats_is_left_alone(tmp_path: Path) -> None:
    decoders.write_checkpoint("llama", tmp_path)
    checkpoint = sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    assert checkpoint.folder == tmp_path
    assert sources.stored(checkpoint) == {}
    assert sources.notes(checkpoint) == ()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("awq", ["14 layers int4 with zero points", "TensorRT refuses zero points"]),
        ("gptq-order", ["14 layers int4 in act-order"]),
        ("ct-w8a8-dynamic", ["per token"]),
        ("ct-fp8-dynamic", ["inputs of 14 layers stay in float"]),
    ],
)
def test_notes_say_what_was_stored_and_what_is_done_otherwise(name: str, words: list[str], tmp_path: Path) -> None:
    quantized_checkpoints.write(name, tmp_path)
    said = "\n".join(sources.notes(sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")))
    for word in ["dequantized weights in float32", *words]:
        assert word in said
    assert ("TensorRT" in said) == (name == "awq")


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        ("awq", {"quant_method": "bitsandbytes"}, "quantized by bitsandbytes"),
        ("awq", {"version": "gemv"}, "layout gemv"),
        ("gptq", {"checkpoint_format": "marlin"}, "layout marlin"),
        ("awq", {"quant_method": "compressed-tensors"}, "no layer has weight_scale"),
        ("ct-int4", scheme(GROUPS | {"num_bits": 3}), "3 bits"),
        ("ct-int4", {"config_groups": {"a": {"targets": ["re:.*mlp.*"], "weights": GROUPS}}}, "no group .*self_attn"),
        ("ct-int8", {"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    ],
)
def test_another_layout_is_refused_by_its_name(name: str, told: dict[str, Any], words: str, tmp_path: Path) -> None:
    quantized_checkpoints.write(name, tmp_path)
    change(tmp_path, **told)
    with pytest.raises(SourceError, match=words) as caught:
        sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    assert caught.value.fix
    assert not list((tmp_path / "cache").glob("quantized/*"))


@pytest.mark.parametrize(
    ("lost", "words"), [("qzeros", "no qzeros"), ("scales", "no scales"), ("g_idx", "blocks of unequal size")]
)
def test_a_layer_that_lacks_something_is_named(lost: str, words: str, tmp_path: Path) -> None:
    quantized_checkpoints.write("gptq-order", tmp_path)
    from safetensors.numpy import save_file

    tensors = named(tmp_path)
    if lost == "g_idx":
        tensors[f"{MLP}.g_idx"][:] = 0
    else:
        del tensors[f"{MLP}.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=words) as caught:
        sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    assert MLP in caught.value.message


def test_blocks_that_were_left_unfilled_lie_in_order(tmp_path: Path) -> None:
    """Some writers leave g_idx all zeros where desc_act is false."""
    from safetensors.numpy import save_file

    layers = quantized_checkpoints.write("gptq", tmp_path)
    tensors = named(tmp_path)
    for name, array in tensors.items():
        if name.endswith("g_idx"):
            array[:] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(read(tmp_path)[f"{MLP}.weight"], layers[MLP].weight.astype(np.float32))


def test_a_layer_takes_the_group_that_names_it_before_one_of_all(tmp_path: Path) -> None:
    layers = quantized_checkpoints.write("ct-int8", tmp_path)
    group = FORMS["ct-int8"].config["config_groups"]["group_0"]
    change(
        tmp_path,
        config_groups={
            "all": {"targets": ["Linear"], "weights": GROUPS},
            "own": group | {"targets": ["re:model.layers.*"]},
        },
    )
    np.testing.assert_array_equal(read(tmp_path)[f"{MLP}.weight"], layers[MLP].weight.astype(np.float32))


@pytest.mark.parametrize("name", ["ct-int4", "ct-int4-zeros", "ct-int8", "ct-w8a8-static", "ct-fp8-static"])
def test_compressed_tensors_own_library_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    layers = quantized_checkpoints.write(name, tmp_path)
    kind = "pack-quantized" if "int" in name else "naive-quantized"
    told = QuantizationScheme.model_validate(FORMS[name].config["config_groups"]["group_0"])
    theirs = load_file(tmp_path / "model.safetensors")
    found = read(tmp_path)
    for layer in layers:
        state = {k.removeprefix(f"{layer}."): v for k, v in theirs.items() if k.startswith(f"{layer}.")}
        state["weight_scale"] = state["weight_scale"].float()
        expected = BaseCompressor.get_value_from_registry(kind).decompress(state, told)["weight"]
        np.testing.assert_array_equal(found[f"{layer}.weight"], expected.to(torch.float32).numpy())


def test_compressed_tensors_own_reader_of_awq_gives_the_same_codes(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from safetensors.torch import load_file

    layers = quantized_checkpoints.write("awq", tmp_path)
    theirs = AutoAWQConverter(group_size=32).process(load_file(tmp_path / "model.safetensors"))
    for layer, written in layers.items():
        codes = unpack_from_int32(theirs[f"{layer}.weight_packed"], 4, written.codes.T.shape)
        np.testing.assert_array_equal(codes.numpy() + 8, written.codes.T)


def test_gptq_zero_points_of_version_one_wrap(tmp_path: Path) -> None:
    """A zero point of 0 is stored as 15, one less, and read as 0 again."""
    layers = quantized_checkpoints.write("gptq-zeros", tmp_path)
    assert any((layer.zeros == 0).any() for layer in layers.values())
    assert FORMS["gptq-zeros"].config == GPTQ
    stored = sources.stored(sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache"))
    for layer, written in layers.items():
        np.testing.assert_array_equal(stored[f"{layer}.weight"].zero_points, written.zeros)
