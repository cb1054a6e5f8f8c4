"""GGUF files: the folder made of one holds what the original checkpoint held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from medcompile import sources
from medcompile.errors import SourceError
from tests import decoders

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _turned(weight: Any, heads: int) -> Any:
    """As llama.cpp's converter writes q and k (convert_hf_to_gguf.py, permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(path: Path, original: Path, *, architecture: str = "llama", kind: Any = None) -> dict[str, Any]:
    """A GGUF file of the checkpoint folder original. Returns the original's tensors."""
    tensors: dict[str, Any] = load_file(original / "model.safetensors")
    config = decoders.config("llama")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    words = decoders.tokenizer().get_vocab()
    tokens = sorted(words, key=words.__getitem__)
    tokens += ["ab", *(f"[unused{i}]" for i in range(decoders.VOCABULARY - len(tokens) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".") if "layers" in name else ("", "", name)
        base, _, suffix = rest.rpartition(".")
        stored = f"blk.{layer}.{_NAMES[base]}.{suffix}" if layer else f"{_NAMES[base]}.{suffix}"
        if base in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _turned(tensor, config["num_attention_heads" if "q_proj" in base else "num_key_value_heads"])  # noqa: PLW2901
        if kind is not None and tensor.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.write_checkpoint("llama", tmp_path_factory.mktemp("original"))


def test_a_float_file_gives_back_every_weight_config_and_tokenizer(original: Path, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "model.gguf", original)
    made = sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    assert "model.gguf" in made.files
    found = load_file(made.folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    config = decoders.config("llama")
    same = ("model_type", "hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "eos_token_id")
    assert {k: made.config[k] for k in same} == {k: config[k] for k in same}
    assert (made.folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert Tokenizer.from_file(str(made.folder / "tokenizer.json")).encode("ab</s>a").tokens == ["ab", "</s>", "a"]
    ids = np.arange(3, 20)
    both = [decoders.logits_of(decoders.reference(folder), ids) for folder in (made.folder, original)]
    np.testing.assert_allclose(*both, atol=1e-5)


@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q8_0], ids=["float", "Q8_0"])
def test_biases_of_attention_come_back_in_order(kind: Any, original: Path, tmp_path: Path) -> None:
    tensors, random = load_file(original / "model.safetensors"), np.random.default_rng(0)
    for name in [n for n in tensors if "self_attn" in n and n.endswith("_proj.weight")]:
        tensors[name.replace("weight", "bias")] = random.normal(size=len(tensors[name])).astype(np.float32)
    biased, place = tmp_path / "original", tmp_path / "made"
    biased.mkdir()
    place.mkdir()
    save_file(tensors, biased / "model.safetensors")
    write_gguf(place / "model.gguf", biased, kind=kind)
    made = sources.resolve(f"path:{place}", cache=tmp_path / "cache")
    found = load_file(made.folder / "model.safetensors")
    assert made.config["attention_bias"] is True
    assert found.keys() == tensors.keys()
    for name in [n for n in tensors if n.endswith("bias")]:
        np.testing.assert_array_equal(found[name], tensors[name], err_msg=name)


def test_a_quantized_file_is_dequantized_once(original: Path, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "model.gguf", original, kind=gguf.GGMLQuantizationType.Q8_0)
    made = sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    written = (made.folder / "model.safetensors").stat().st_mtime_ns
    for name, tensor in load_file(made.folder / "model.safetensors").items():
        error = np.abs(tensor - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 1 / 127, name
    again = sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    assert (again.folder, (again.folder / "model.safetensors").stat().st_mtime_ns) == (made.folder, written)


def test_another_architecture_is_refused(original: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", original, architecture="falcon")
    with pytest.raises(SourceError, match="falcon") as caught:
        sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
    assert "safetensors" in caught.value.fix
    assert not list((tmp_path / "cache" / "gguf").iterdir()), "nothing half made is left"


@pytest.mark.parametrize("size", [3, 40, 3000])
def test_a_damaged_file_is_refused(size: int, original: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", original)
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[:size])
    with pytest.raises(SourceError, match="damaged"):
        sources.resolve(f"path:{tmp_path}", cache=tmp_path / "cache")
