"""GGUF files, llama.cpp's own format: one made, once, into the folder that transformers would have saved.

Weights are dequantized to float32 (a scale and an offset per block fit no symmetric format of ours) and named as the
original checkpoint names them; config, tokenizer and chat template come out of the file's metadata. The folder lies in
the cache under the file's sha256, so that the rest of the compiler sees safetensors only.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import SourceError
from medcompile.sources.folder import Checkpoint, os_errors, present, read_checkpoint, require

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

_LAYOUT = 1  # raised when the conversion below changes what it writes
_PIECE_VALUES = 1 << 22
# What general.architecture is called by transformers. llama.cpp calls Mistral and SmolLM llama as well.
_MODELS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_CONFIG = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
_OPTIONAL = ("head_dim", "num_key_value_heads", "rope_theta")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_USE_ORIGINAL = "use the original checkpoint's safetensors"


def find(folder: Path) -> Path | None:
    """The one GGUF file of a folder without config.json, or None."""
    if (folder / "config.json").exists():
        return None
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def read_gguf(source: str, path: Path, sha256: str, cache: Path) -> Checkpoint:
    """The checkpoint that a GGUF file holds. Its files are those of the folder made of it, and the GGUF itself.

    Raises SourceError for a damaged file, an architecture that is none of llama, qwen2 and qwen3, or tensors of a kind
    that the gguf package does not read.
    """
    folder = cache / "gguf" / f"{sha256}-{_LAYOUT}"
    if not (folder / "config.json").is_file():
        require(source, "gguf")
        require(source, "transformers")
        with os_errors(f"{source}: converting {path.name} into {folder}", fix=f"check that {cache} can be written"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
            try:
                _convert(source, path, partial)
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
                partial.replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    made = read_checkpoint(source, None, folder, present(folder), cache)
    return Checkpoint(
        source, None, folder, {path.name: sha256, **made.files}, made.kind, made.weights, made.config, cache
    )


def _convert(source: str, path: Path, out: Path) -> None:
    import gguf
    import transformers

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise SourceError(f"{source}: {path.name} is a damaged GGUF file: {error}", fix="fetch it again") from error
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(source, facts, tensors)
    _write_weights(source, tensors, config, out / "model.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokenizer.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _config(source: str, facts: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers would have it."""
    kind = str(facts.get("general.architecture", ""))
    if kind not in _MODELS:
        raise SourceError(
            f"{source}: a GGUF file of architecture {kind or 'unknown'}; this reads {', '.join(_MODELS)}",
            fix=_USE_ORIGINAL,
        )
    scaling = facts.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "") or "rope_freqs.weight" in tensors:
        raise SourceError(f"{source}: a GGUF file with scaled rotary positions", fix=_USE_ORIGINAL)
    if f"{kind}.expert_count" in facts or "token_embd.weight" not in tensors:
        raise SourceError(f"{source}: a GGUF file of something else than a dense decoder", fix=_USE_ORIGINAL)
    config = {ours: facts.get(f"{kind}.{theirs}") for ours, theirs in _CONFIG.items()}
    if missing := [_CONFIG[k] for k, v in config.items() if v is None and k not in _OPTIONAL]:
        raise SourceError(f"{source}: a GGUF file that does not say {', '.join(missing)}", fix="fetch it again")
    config = {k: v for k, v in config.items() if v is not None}
    config |= {
        "model_type": _MODELS[kind],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "hidden_act": "silu",
        "dtype": "float32",
    }
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[name] = facts.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _write_weights(source: str, tensors: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """One safetensors file, a few million values at a time."""
    named = {_name(source, name): tensor for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named.items():
        shape = [int(n) for n in reversed(tensor.shape)]
        size = int(np.prod(shape)) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in named.items():
            turned = re.search(r"\.(q_proj|k_proj)\.", name) if config["model_type"] == "llama" else None
            groups = int(heads[turned[1]] or config["num_attention_heads"]) if turned else 1
            for piece in _pieces(source, tensor, groups):
                file.write((_unturned(piece) if turned else piece).tobytes())


def _pieces(source: str, tensor: Any, groups: int) -> Iterator[Array]:
    """The tensor in float32, in pieces of whole rows; of a tensor of several groups of rows, a group at a time."""
    import gguf

    def floats(part: Array) -> Array:
        try:
            made: Array = gguf.quants.dequantize(part, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise SourceError(
                f"{source}: {tensor.name} is {tensor.tensor_type.name}, which the gguf package does not read",
                fix=_USE_ORIGINAL,
            ) from error
        return made

    data = tensor.data
    if data.ndim == 1:  # a bias: a row is one value
        yield from np.split(floats(data), groups)
        return
    rows = int(np.prod(tensor.shape[1:]))
    step = rows // groups if groups > 1 else max(1, _PIECE_VALUES // int(tensor.shape[0]))
    for start in range(0, rows, step):
        yield floats(data[start : start + step])


def _unturned(rows: Array) -> Array:
    """One head's rows of q or k: llama.cpp pairs angle i with row 2i and 2i + 1, transformers with i and i + half."""
    return rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def _name(source: str, name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. Raises SourceError for one that has no place."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        raise SourceError(f"{source}: a GGUF file with a tensor {name}, which no dense decoder has", fix=_USE_ORIGINAL)
    layer = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"
