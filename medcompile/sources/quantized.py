"""Checkpoints that come quantized (AutoAWQ, GPTQ, compressed-tensors): one made, once, into a folder of floats.

The folder lies in the cache under a digest of the files it was made from: config without its quantization_config, the
weights dequantized to float32 (exact: a 16-bit scale times an 8-bit code), everything else as it was, and beside
them a table of how each layer was stored. So the compiler and the reference see an ordinary checkpoint, and only the
variant `weights: stored` asks for the table. Layouts are read in packed.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.errors import SourceError
from medcompile.sources.folder import (
    INDEX_FILES,
    Checkpoint,
    digest,
    os_errors,
    present,
    read_checkpoint,
    read_json,
    require,
)
from medcompile.sources.tensors import DTYPES

if TYPE_CHECKING:
    import numpy as np

    from medcompile.sources.tensors import TensorRef
    from medcompile.stored import StoredLinear

    Array = np.ndarray[Any, Any]

_LAYOUT = 1  # raised when what is written into the folder changes
_TABLE, _NOTES = "stored.npz", "stored.json"
_PIECE_BYTES = 16 << 20
_METHODS = ("awq", "gptq", "compressed-tensors")
# What marks a quantized layer: the tensor that every one has, by method.
_MARKS = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_scale"}
_PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": (
        *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("input_scale", "input_zero_point"),
    ),
}
_CODES = {name: code for code, (name, _) in DTYPES.items()}
_USE_ORIGINAL = "use the checkpoint that it was quantized from, and quantize that here (weights: int4, method: awq)"


def read_quantized(checkpoint: Checkpoint, tensors: Callable[[], Mapping[str, TensorRef]]) -> Checkpoint:
    """The float checkpoint that a quantized one holds; one that is not quantized, as it is.

    Raises SourceError for a method, or a layout of one, that this can't read.
    """
    told = checkpoint.config.get("quantization_config")
    if not told or checkpoint.kind == "onnx":
        return checkpoint
    _check(checkpoint.source, told)
    made_from = json.dumps([_LAYOUT, dict(checkpoint.files)], sort_keys=True)
    folder = checkpoint.cache / "quantized" / hashlib.sha256(made_from.encode()).hexdigest()
    if not (folder / "config.json").is_file():
        require(checkpoint.source, "ml_dtypes")
        doing = f"{checkpoint.source}: dequantizing it into {folder}"
        with os_errors(doing, fix=f"check that {checkpoint.cache} can be written"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
            try:
                _convert(checkpoint, told, tensors(), partial)
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
                partial.replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    made = read_checkpoint(checkpoint.source, checkpoint.revision, folder, present(folder), checkpoint.cache)
    before = {f"quantized/{name}": checkpoint.files[name] for name in ("config.json", *checkpoint.weights)}
    return replace(made, files={**made.files, _TABLE: digest(checkpoint.source, folder, _TABLE), **before})


def stored(checkpoint: Checkpoint) -> dict[str, StoredLinear]:
    """By name of the weight, how each layer was stored; nothing for a checkpoint that came in floats."""
    import numpy as np

    from medcompile.stored import from_arrays

    if _TABLE not in checkpoint.files:
        return {}
    with np.load(checkpoint.folder / _TABLE, allow_pickle=False) as arrays:
        return from_arrays(arrays)


def notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a user should know of how the checkpoint was read."""
    if _TABLE not in checkpoint.files:
        return ()
    return tuple(read_json(checkpoint.source, checkpoint.folder / _NOTES)["notes"])


def _check(source: str, told: Mapping[str, Any]) -> None:
    method = told.get("quant_method")
    layout = str(told.get("checkpoint_format") or told.get("version") or told.get("format") or "")
    reason = ""
    if method not in _METHODS:
        reason = f"are quantized by {method or 'an unknown method'}; this reads {', '.join(_METHODS)}"
    elif method == "awq" and layout.lower() not in ("", "gemm"):
        reason = f"lie in AWQ's layout {layout}; this reads gemm"
    elif method == "gptq" and layout.lower() not in ("", "gptq", "gptq_v2"):
        reason = f"lie in GPTQ's layout {layout}; this reads gptq and gptq_v2"
    elif method == "compressed-tensors" and (told.get("transform_config") or {}).get("config_groups"):
        reason = "are rotated (transform_config), and its activations would have to be"
    elif (told.get("sparsity_config") or {}).get("format", "dense") != "dense":
        reason = "are stored sparse"
    if reason:
        raise SourceError(f"{source}: its weights {reason}", fix=_USE_ORIGINAL)


def _convert(checkpoint: Checkpoint, told: Mapping[str, Any], tensors: Mapping[str, TensorRef], out: Path) -> None:
    import numpy as np

    from medcompile.stored import to_arrays

    table, unrounded = _write_weights(checkpoint.source, told, tensors, out / "model.safetensors")
    np.savez(out / _TABLE, **to_arrays(table))  # type: ignore[arg-type]
    said = _told(told, table, unrounded)
    (out / _NOTES).write_text(json.dumps({"quantization_config": told, "notes": said}), encoding="utf-8")
    for name in checkpoint.files:
        if name not in (*checkpoint.weights, *INDEX_FILES, "config.json"):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, out / name)
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "torch_dtype")}
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1), encoding="utf-8")


def _write_weights(
    source: str, told: Mapping[str, Any], tensors: Mapping[str, TensorRef], path: Path
) -> tuple[dict[str, StoredLinear], int]:
    """One safetensors file, a layer at a time. Returns the table, and how many layers' inputs stay in float although
    the checkpoint rounds them."""
    import numpy as np

    from medcompile.sources import packed

    layers = _layers(source, told, tensors)
    inside = {f"{layer}.{part}" for layer, parts in layers.items() for part in parts}
    plain = {name: ref for name, ref in tensors.items() if name not in inside and not _is_cache_scale(name)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for layer, parts in layers.items():
        with _naming(source, layer):
            outputs, inputs = packed.shape(parts, told["quant_method"])
        size = 4 * outputs * inputs
        header[f"{layer}.weight"] = {"dtype": "F32", "shape": [outputs, inputs], "data_offsets": [end, end + size]}
        end += size
    for name, ref in plain.items():
        header[name] = {"dtype": _CODES[ref.dtype], "shape": ref.shape, "data_offsets": [end, end + ref.nbytes]}
        end += ref.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    table, unrounded = {}, 0
    read = {"awq": packed.awq, "gptq": packed.gptq, "compressed-tensors": packed.compressed}[told["quant_method"]]
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for layer, parts in layers.items():
            scheme = _scheme(source, told, layer) if read is packed.compressed else told
            with _naming(source, layer):
                linear, weight = read(parts, scheme)
            if not np.isfinite(weight).all():
                raise SourceError(f"{source}: layer {layer} holds NaN or Inf", fix="fetch the checkpoint again")
            name = f"{layer}.weight"
            assert list(weight.shape[::-1]) == header[name]["shape"], name
            file.write(np.ascontiguousarray(weight.T).data)
            table[name] = linear
            unrounded += not packed.rounds_input(scheme, linear) if read is packed.compressed else 0
        for ref in plain.values():
            with ref.file.open("rb") as original:
                original.seek(ref.offset)
                for start in range(0, ref.nbytes, _PIECE_BYTES):
                    file.write(original.read(min(_PIECE_BYTES, ref.nbytes - start)))
    return table, unrounded


def _layers(source: str, told: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """The quantized layers by name, each with its tensors by the last part of their names."""
    method = told["quant_method"]
    mark = f".{_MARKS[method]}"
    names = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
    layers = {n: {p: tensors[f"{n}.{p}"] for p in _PARTS[method] if f"{n}.{p}" in tensors} for n in names}
    if not layers:
        raise SourceError(
            f"{source}: config.json says {method}, but no layer has {_MARKS[method]}",
            fix="config.json and the weights are not of one model; fetch both again",
        )
    if any(name.endswith(".weight_global_scale") for name in tensors):
        raise SourceError(f"{source}: its weights are 4-bit floats; this reads int4, int8, float8", fix=_USE_ORIGINAL)
    return layers


@contextmanager
def _naming(source: str, layer: str) -> Iterator[None]:
    from medcompile.sources.packed import LayoutError

    try:
        yield
    except LayoutError as error:
        raise SourceError(f"{source}: layer {layer} has {error}", fix=_USE_ORIGINAL) from error


def _scheme(source: str, told: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """The group of config_groups that the layer belongs to: by its name, by a pattern, or as Linear."""
    groups = [g for g in (told.get("config_groups") or {}).values() if isinstance(g, dict) and g.get("weights")]

    def matches(target: str, how: int) -> bool:
        if target.startswith("re:"):
            return how == 1 and re.match(target[3:], layer) is not None
        return target == layer if how == 0 else how == 2 and target == "Linear"

    for how in range(3):
        for group in groups:
            if any(matches(str(target), how) for target in group.get("targets") or ()):
                return group
    raise SourceError(f"{source}: no group of quantization_config holds the layer {layer}", fix=_USE_ORIGINAL)


def _is_cache_scale(name: str) -> bool:
    """Scales of a cache of keys and values in 8 bits: ours is of whatever type its backend keeps."""
    return re.search(r"self_attn\.(k|v|q)_(scale|zero_point)$", name) is not None


def _told(told: Mapping[str, Any], table: Mapping[str, StoredLinear], unrounded: int) -> list[str]:
    kinds = Counter(
        t.format + " with zero points" * (t.zero_points is not None) + " in act-order" * (t.groups is not None)
        for t in table.values()
    )
    layers = ", ".join(f"{count} layers {kind}" for kind, count in sorted(kinds.items()))
    said = [
        f"the checkpoint came quantized by {told['quant_method']} ({layers}): float variants and the reference are its "
        "dequantized weights in float32, and weights: stored has its own integers and scales"
    ]
    if any(t.zero_points is not None for t in table.values()):
        said.append(
            "TensorRT refuses zero points of weights, which this checkpoint has: for that target use weights: int4"
        )
    if any(t.dynamic for t in table.values()):
        said.append("inputs are rounded per token over -127..127; vLLM's kernels may go to -128")
    if unrounded:
        said.append(f"the inputs of {unrounded} layers stay in float, although the checkpoint rounds them too")
    if told.get("kv_cache_scheme"):
        said.append("the checkpoint's scales for a quantized cache of keys and values are not used")
    return said
