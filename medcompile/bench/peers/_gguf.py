"""A checkpoint as a GGUF file, for llama.cpp. Needs numpy and gguf alone: no torch, no transformers.

What llama.cpp's convert_hf_to_gguf.py does for the plain decoders of this product, less the tokenizer: its contenders
are given token ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medcompile.bench.peer import Array
from medcompile.errors import SourceError

_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py and bench the GGUF file"


def write(folder: Path, out: Path) -> None:
    """Write the checkpoint in folder to out, matrices in the format that they are stored in."""
    import gguf

    from medcompile import sources

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise SourceError(f"{folder}: no GGUF writer for a {kind} model here", fix=_CONVERT)
    architecture = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[kind])
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    w = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    w.add_block_count(layers)
    w.add_context_length(int(config["max_position_embeddings"]))
    w.add_embedding_length(int(config["hidden_size"]))
    w.add_feed_forward_length(int(config["intermediate_size"]))
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(width)
    w.add_value_length(width)
    w.add_rope_dimension_count(width)
    w.add_rope_freq_base(_rope_base(folder, config))
    w.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    w.add_vocab_size(int(config["vocab_size"]))
    w.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, ref in sources.tensors(sources.resolve(f"path:{folder}")).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None or name.endswith("rotary_emb.inv_freq"):
            continue
        array = _read(ref)
        if kind in ("llama", "mistral") and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
            array = _interleaved(array, heads if "q_proj" in name else kv_heads)
        if array.ndim == 1:
            w.add_tensor(target, _float32(array, ref.dtype))
        elif ref.dtype == "bfloat16":
            w.add_tensor(target, array.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            w.add_tensor(target, array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _rope_base(folder: Path, config: dict[str, Any]) -> float:
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind != "default":
        raise SourceError(f"{folder}: positions scaled by {kind}", fix=_CONVERT)
    return float(said.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _read(ref: Any) -> Array:
    """A tensor as it lies in its file; bfloat16 as uint16."""
    import numpy as np

    dtype = "uint16" if ref.dtype == "bfloat16" else ref.dtype
    stored: Array = np.memmap(ref.file, dtype, "r", ref.offset, ref.shape)
    return stored


def _float32(array: Array, dtype: str) -> Array:
    import numpy as np

    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _interleaved(array: Array, heads: int) -> Array:
    """Rows of a query or key projection in the order of llama.cpp's rotation: pairs side by side, not halves."""
    import numpy as np

    rows = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(array.shape))
