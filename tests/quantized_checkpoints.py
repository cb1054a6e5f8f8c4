"""Tiny decoders that come quantized, with random codes: packed here from the formats' public definitions alone.

AutoAWQ's gemm layout, GPTQ's v1 and v2, and compressed-tensors' pack-quantized, int-quantized and float-quantized.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests import decoders

Array = np.ndarray[Any, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layer:
    """codes [inputs, outputs] and zeros [blocks, outputs] as numbers, whatever their storage; groups [inputs]."""

    codes: Array
    zeros: Array
    scales: Array
    groups: Array
    input_scale: float = 0.0
    input_zero: int = 0

    @property
    def weight(self) -> Array:
        """[outputs, inputs], worked out number by number in float64."""
        inputs, outputs = self.codes.shape
        found = np.empty((outputs, inputs))
        for k in range(inputs):
            g = self.groups[k]
            found[:, k] = (self.codes[k].astype(np.float64) - self.zeros[g]) * self.scales[g].astype(np.float64)
        return found


@dataclass(frozen=True)
class Form:
    """A quantized format. low, high: range of codes. block 0: one scale per output. mark: what config.json says."""

    store: Callable[[Layer], dict[str, Array]]
    config: dict[str, Any]
    low: int = 0
    high: int = 15
    block: int = 32
    zero: int | None = None
    act_order: bool = False
    floats: bool = False
    scale_dtype: Any = np.float16


def pack(codes: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """int32 words along axis; the code that stands at place order[i] of a word's codes takes its bits i*bits up."""
    rows = np.moveaxis(codes.astype(np.int64), axis, -1)
    per = 32 // bits
    padding = -rows.shape[-1] % per
    rows = np.pad(rows, [(0, 0), (0, padding)])
    words = np.zeros((rows.shape[0], rows.shape[1] // per), np.uint64)
    for i in range(per):
        words |= rows[:, (order or range(per))[i] :: per].astype(np.uint64) << np.uint64(i * bits)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


def awq(layer: Layer) -> dict[str, Array]:
    return {
        "qweight": pack(layer.codes, 4, 1, AWQ_ORDER),
        "qzeros": pack(layer.zeros, 4, 1, AWQ_ORDER),
        "scales": layer.scales,
    }


def gptq(bits: int, minus: int) -> Callable[[Layer], dict[str, Array]]:
    def store(layer: Layer) -> dict[str, Array]:
        return {
            "qweight": pack(layer.codes, bits, 0),
            "qzeros": pack((layer.zeros - minus) % 2**bits, bits, 1),
            "scales": layer.scales,
            "g_idx": layer.groups.astype(np.int32),
        }

    return store


def packed(bits: int, *, zeros: bool = False, groups: bool = False) -> Callable[[Layer], dict[str, Array]]:
    def store(layer: Layer) -> dict[str, Array]:
        half = 2 ** (bits - 1)
        parts = {
            "weight_packed": pack(layer.codes.T + half, bits, 1),
            "weight_scale": layer.scales.T,
            "weight_shape": np.array(layer.codes.T.shape, np.int64),
        }
        if zeros:
            parts["weight_zero_point"] = pack(layer.zeros.T + half, bits, 0)
        if groups:
            parts["weight_g_idx"] = layer.groups.astype(np.int32)
        return parts

    return store


def eight_bits(*, static: bool = False, floats: bool = False, tensor: bool = False) -> Callable[..., dict[str, Array]]:
    def store(layer: Layer) -> dict[str, Array]:
        parts = {
            "weight": layer.codes.T.astype(ml_dtypes.float8_e4m3fn if floats else np.int8),
            "weight_scale": layer.scales[0, :1] if tensor else layer.scales.T,
        }
        if static:
            parts["input_scale"] = np.array([layer.input_scale], np.float32)
            if not floats:
                parts["input_zero_point"] = np.array([layer.input_zero], np.int8)
        return parts

    return store


def scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "symmetric": True} | weights,
        "input_activations": inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False}
FLOAT = {"num_bits": 8, "type": "float"}
FORMS = {
    "awq": Form(awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "gptq": Form(gptq(4, 1), GPTQ | {"sym": True}, zero=8),
    "gptq-zeros": Form(gptq(4, 1), GPTQ),
    "gptq-order": Form(gptq(4, 1), GPTQ | {"sym": True, "desc_act": True}, zero=8, act_order=True),
    "gptq-order-zeros": Form(gptq(4, 0), GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True}, act_order=True),
    "gptq-channel": Form(gptq(4, 1), GPTQ | {"sym": True, "group_size": -1}, zero=8, block=0),
    "gptq-int8": Form(gptq(8, 1), GPTQ | {"bits": 8, "sym": True}, high=255, zero=128),
    "gptq-int8-zeros": Form(gptq(8, 0), GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, high=255),
    "ct-int4": Form(packed(4), scheme(GROUPS), -8, 7, zero=0, scale_dtype=ml_dtypes.bfloat16),
    "ct-int4-zeros": Form(packed(4, zeros=True), scheme(GROUPS | {"symmetric": False}), -8, 7),
    "ct-int4-order": Form(
        packed(4, groups=True), scheme(GROUPS | {"actorder": "group"}), -8, 7, zero=0, act_order=True
    ),
    "ct-int8": Form(packed(8), scheme(CHANNEL), -128, 127, block=0, zero=0),
    "ct-w8a8-static": Form(eight_bits(static=True), scheme(CHANNEL, TENSOR), -128, 127, block=0, zero=0),
    "ct-w8a8-dynamic": Form(eight_bits(), scheme(CHANNEL, TOKEN), -127, 127, block=0, zero=0, scale_dtype=np.float32),
    "ct-fp8-static": Form(
        eight_bits(static=True, floats=True, tensor=True),
        scheme(FLOAT | {"strategy": "tensor"}, FLOAT | {"strategy": "tensor", "dynamic": False}),
        block=0,
        zero=0,
        floats=True,
        scale_dtype=ml_dtypes.bfloat16,
    ),
    "ct-fp8-dynamic": Form(
        eight_bits(floats=True),
        scheme(FLOAT | {"strategy": "channel"}, FLOAT | {"strategy": "token", "dynamic": True}),
        block=0,
        zero=0,
        floats=True,
    ),
}


def write(name: str, folder: Path, *, shards: int = 1) -> dict[str, Layer]:
    """A decoder in the form called name. Returns its quantized layers by name."""
    from safetensors.numpy import load_file, save_file

    form = FORMS[name]
    decoders.write_checkpoint("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    random = np.random.default_rng(11)
    layers = {}
    for key in [k for k in sorted(tensors) if k.endswith("_proj.weight")]:
        shape = tensors.pop(key).shape
        layer = key.removesuffix(".weight")
        layers[layer] = _drawn(form, shape[1], shape[0], random, layer)
        tensors |= {f"{layer}.{part}": np.ascontiguousarray(a) for part, a in form.store(layers[layer]).items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        index = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(sorted(tensors))}
        for file in set(index.values()):
            save_file({k: a for k, a in tensors.items() if index[k] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"quantization_config": form.config}))
    return layers


def _drawn(form: Form, inputs: int, outputs: int, random: np.random.Generator, name: str) -> Layer:
    blocks = inputs // form.block if form.block else 1
    if form.floats:
        codes = random.normal(0, 60, (inputs, outputs)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        codes = random.integers(form.low, form.high + 1, (inputs, outputs))
    span = 240.0 if form.floats else form.high - form.low
    scales = (random.uniform(0.5, 1.5, (blocks, outputs)) / span).astype(form.scale_dtype)
    if name.endswith("layers.1.mlp.up_proj"):
        scales[0, 3] = 0  # of a block that is all zeros, in some writers' hands
    if form.config.get("config_groups", {}).get("group_0", {}).get("weights", {}).get("strategy") == "tensor":
        scales[:] = scales[0, 0]
    zeros = random.integers(form.low, form.high + 1, (blocks, outputs))
    if form.zero is not None:
        zeros[:] = form.zero
    groups = np.arange(inputs) // (inputs // blocks)
    if form.act_order:  # by the input that layers share, as their Hessian is
        kind = "in" if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")) else name
        groups = groups[np.random.default_rng(len(kind)).permutation(inputs)]
    return Layer(codes, zeros, scales, groups, 0.03125, -5)
