"""How quantized linear layers lie in a checkpoint: AutoAWQ's, GPTQ's and compressed-tensors' tensors, one layer each.

Each reader takes a layer's tensors by the last part of their names, and gives its StoredLinear and its weight in
float32. Which layers there are, and what their config says of them, is quantized.py's business.

    awq     qweight int32 [K, N / 8], qzeros int32 [K / g, N / 8]: along outputs, nibble i of a word is output
            (0, 2, 4, 6, 1, 3, 5, 7)[i]; scales [K / g, N]. Source: AutoAWQ's WQLinear_GEMM.
    gptq    qweight int32 [K / p, N], along inputs; qzeros int32 [K / g, N / p], along outputs, one less than meant
            (checkpoint_format gptq) or as meant (gptq_v2); scales [K / g, N]; g_idx [K]: the block of each input.
            p codes a word, the first in the lowest bits. Source: AutoGPTQ's QuantLinear, GPTQModel.
    compressed-tensors
            weight_packed int32 [N, K / p], along inputs, of codes plus half their range, and weight_shape; or weight
            as int8 or float8 [N, K]; weight_scale [N, K / g], [N, 1] or one number; weight_zero_point, packed along
            outputs where it is int32; weight_g_idx [K]. Source: its pack_quantized and naive_quantized compressors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from medcompile.stored import Format, StoredLinear

if TYPE_CHECKING:
    from medcompile.sources.tensors import TensorRef

    Array = np.ndarray[Any, Any]
    Parts = Mapping[str, TensorRef]
    Read = tuple[StoredLinear, Array]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FORMATS: Mapping[int, Format] = {4: "int4", 8: "int8"}


class LayoutError(ValueError):
    """Tensors that don't fit together, or a layout that this can't read; the message says which."""


def shape(parts: Parts, method: str) -> tuple[int, int]:
    """(outputs, inputs) of a layer of that quant_method, without reading its weights. Raises LayoutError."""
    if method == "compressed-tensors":
        outputs, inputs = _array(parts, "weight_shape") if "weight_shape" in parts else _ref(parts, "weight").shape
        return int(outputs), int(inputs)
    rows, outputs = _ref(parts, "qweight").shape[0], _ref(parts, "scales").shape[-1]
    return outputs, rows * 32 // _gptq_bits(parts) if method == "gptq" else rows


def awq(parts: Parts, told: Mapping[str, Any]) -> Read:
    """told: quantization_config. Returns the layer and its weight float32 [inputs, outputs]. Raises LayoutError."""
    if told.get("bits", 4) != 4:
        raise LayoutError(f"{told['bits']} bits, where AutoAWQ's layout has 4")
    scales = _floats(parts, "scales")
    codes = _unpacked(_array(parts, "qweight"), 4, 1, _AWQ_ORDER)
    if told.get("zero_point", True):
        zeros = _unpacked(_array(parts, "qzeros"), 4, 1, _AWQ_ORDER)
    else:
        zeros = np.full(scales.shape, 8, np.int16)
    return _integers(codes, zeros, scales, None, 4)


def gptq(parts: Parts, told: Mapping[str, Any]) -> Read:
    """As awq()."""
    scales = _floats(parts, "scales")
    bits = _gptq_bits(parts)
    codes, zeros = _unpacked(_array(parts, "qweight"), bits, 0), _unpacked(_array(parts, "qzeros"), bits, 1)
    if told.get("checkpoint_format", told.get("format", "gptq")) != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)  # a zero of 0 was stored as the largest code
    groups = _array(parts, "g_idx").astype(np.int32) if "g_idx" in parts else None
    if groups is not None and told.get("desc_act") is False and not _even(groups, len(scales)):
        groups = None  # left unfilled by some writers where they don't need it
    return _integers(codes, zeros, scales, groups, bits)


def compressed(parts: Parts, scheme: Mapping[str, Any]) -> Read:
    """scheme: the layer's group of quantization_config.config_groups. As awq()."""
    said = scheme.get("weights") or {}
    bits, is_float = int(said.get("num_bits", 8)), said.get("type") == "float"
    packed = "weight_packed" in parts
    if packed:
        shape = [int(n) for n in _array(parts, "weight_shape")]
        codes = _unpacked(_array(parts, "weight_packed"), _known(bits), 1)[:, : shape[1]].T
    else:
        codes = _array(parts, "weight").T
    scales = _floats(parts, "weight_scale")
    if scales.size == 1:
        scales = np.full((codes.shape[1], 1), scales.item(), np.float32)
    scales = np.ascontiguousarray(scales.reshape(len(scales), -1).T)
    if is_float:
        if codes.dtype != ml_dtypes.float8_e4m3fn or scales.shape != (1, codes.shape[1]):
            raise LayoutError("floats other than float8 (E4M3) with a scale per tensor or output")
        weight = codes.astype(np.float32) * scales
        return _with_input(StoredLinear("float8", scales), parts, scheme), weight
    middle = 2 ** (_known(bits) - 1)
    if not packed:
        codes = codes.astype(np.int16) + middle
    zeros = np.full(scales.shape, middle, np.int16)
    if said.get("symmetric") is False:
        stored = _array(parts, "weight_zero_point")
        if stored.dtype == np.int32:
            zeros = _unpacked(stored, bits, 0)[: codes.shape[1]].T
        else:
            zeros = stored.reshape(len(stored), -1).T.astype(np.int16) + middle
    groups = _array(parts, "weight_g_idx").astype(np.int32) if "weight_g_idx" in parts else None
    layer, weight = _integers(codes, zeros, scales, groups, bits)
    return _with_input(layer, parts, scheme), weight


def rounds_input(scheme: Mapping[str, Any], layer: StoredLinear) -> bool:
    """True if the layer's input is rounded in the graph as its scheme says, or if the scheme leaves it in float."""
    return not scheme.get("input_activations") or layer.dynamic or layer.input_scale is not None


def _with_input(layer: StoredLinear, parts: Parts, scheme: Mapping[str, Any]) -> StoredLinear:
    """How the input is rounded, where there are operators for it: 8 bits on both sides, weights by output channel."""
    said = scheme.get("input_activations") or {}
    formats = {("int", 8): "int8", ("float", 8): "float8"}
    if not said or formats.get((said.get("type", "int"), said.get("num_bits", 8))) != layer.format or layer.blocks > 1:
        return layer
    if said.get("dynamic"):
        plain = layer.zero_points is None and said.get("strategy") == "token" and said.get("symmetric", True)
        return StoredLinear(layer.format, layer.scales, dynamic=True) if plain and layer.format == "int8" else layer
    if "input_scale" not in parts or parts["input_scale"].nbytes > 8:
        return layer
    zero = int(_array(parts, "input_zero_point").item()) if "input_zero_point" in parts else 0
    return StoredLinear(
        layer.format,
        layer.scales,
        layer.zero_points,
        input_scale=float(_floats(parts, "input_scale").item()),
        input_zero_point=zero if layer.format == "int8" else 0,
    )


def _integers(codes: Array, zeros: Array, scales: Array, groups: Array | None, bits: int) -> Read:
    """codes [inputs, outputs] and zeros [blocks, outputs], both unsigned. The layer, and its weight."""
    inputs, outputs = codes.shape
    blocks = len(scales)
    if scales.shape != (blocks, outputs) or zeros.shape != scales.shape or inputs % blocks:
        raise LayoutError(f"codes {codes.shape} with scales {scales.shape} and zero points {zeros.shape}")
    order = np.arange(inputs, dtype=np.int32) // (inputs // blocks)
    if groups is not None and (blocks == 1 or np.array_equal(groups, order)):
        groups = None
    if groups is not None and (len(groups) != inputs or not _even(groups, blocks)):
        raise LayoutError("blocks of unequal size, or of no input")
    at = order if groups is None else groups
    weight = (codes.astype(np.float32) - zeros[at].astype(np.float32)) * scales[at]
    middle = 2 ** (bits - 1)
    found: Array | None = None
    if (zeros != middle).any():
        found = zeros.astype(np.uint8) if bits == 4 else (zeros - middle).astype(np.int8)
    return StoredLinear(_FORMATS[bits], scales, found, groups), weight


def _even(groups: Array, blocks: int) -> bool:
    if groups.min() < 0 or groups.max() >= blocks:
        return False
    return len(set(np.bincount(groups, minlength=blocks).tolist())) == 1


def _unpacked(words: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """The codes, int16 and unsigned, that int32 words hold along an axis. order: where code i of a word stands."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    if order is not None:
        shifts = shifts[np.argsort(order)]
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    codes = ((words[..., None] >> shifts) & np.uint32(2**bits - 1)).astype(np.int16)
    return np.moveaxis(codes.reshape(*words.shape[:-1], -1), -1, axis)


def _known(bits: int) -> int:
    if bits not in _FORMATS:
        raise LayoutError(f"{bits} bits; this reads 4 and 8")
    return bits


def _gptq_bits(parts: Parts) -> int:
    """By sizes, for a checkpoint may have layers of several: zero points hold a code for every output."""
    return _known(_ref(parts, "qzeros").shape[-1] * 32 // _ref(parts, "scales").shape[-1])


def _floats(parts: Parts, name: str) -> Array:
    return _array(parts, name).astype(np.float32)


def _array(parts: Parts, name: str) -> Array:
    ref = _ref(parts, name)
    dtype = np.dtype(getattr(ml_dtypes, ref.dtype, ref.dtype))
    return np.fromfile(ref.file, dtype, ref.nbytes // dtype.itemsize, offset=ref.offset).reshape(ref.shape)


def _ref(parts: Parts, name: str) -> TensorRef:
    if name not in parts:
        raise LayoutError(f"no {name}")
    return parts[name]
