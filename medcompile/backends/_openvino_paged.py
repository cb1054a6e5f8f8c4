"""Decoders on OpenVINO: its own paged attention on a CPU, behind the runtime's StepModel.

The library's operator is not in its public Python face, nor is it what an ONNX file can name: a conversion extension
puts one in the place of each `medcompile::PagedAttention` while the graph is read. OpenVINO's own files can't hold such
an operator, so the artifact is ONNX. Pools are tensors that the step model owns, and the operator writes into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends import Built
from medcompile.backends._host_pools import POOLS, HostPools
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.spec import GraphSpec, Scalar, Target, Variant

if TYPE_CHECKING:
    import openvino as ov

    from medcompile.runtime.decoder import StepBatch

    Array = np.ndarray[Any, Any]

# What compute.kv may say -> the library's KV_CACHE_PRECISION.
KV_FORMATS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "uint8": "u8"}
BLOCK_SIZE = 32  # the only one that the library's CPU kernel has


def kv_format(variant: Variant, settings: Mapping[str, Scalar]) -> str:
    """What the variant's keys and values are kept in: the float that it computes in, unless it says uint8.

    Raises BackendError for anything else: the library's kernel mixes no two floats.
    """
    kv = str(variant.compute.get("kv", settings["float"]))
    if kv not in (settings["float"], "uint8"):
        raise BackendError(
            f"variant {variant.name}: compute.kv is {kv!r} where compute.float is {settings['float']!r}",
            fix=f"choose {settings['float']} or uint8",
        )
    return kv


def build(
    openvino: Any,
    onnx_path: Path,
    spec: GraphSpec,
    variant: Variant,
    target: Target,
    out: Path,
    settings: Mapping[str, Scalar],
) -> Built:
    """Write out/model.onnx and out/weights.bin, once OpenVINO has read it. Raises BackendError."""
    from medcompile import onnx_files
    from medcompile.rewrites import openvino as dialect

    graph = onnx_files.load(onnx_path)
    notes = [f"{name}={value}" for name, value in {**settings, "kv": kv_format(variant, settings)}.items()]
    if variant.any_dynamic:
        notes += dialect.told(dialect.rewrite(graph), variant)
    onnx_files.save({"model": graph}, out)
    core = openvino.Core()
    core.add_extension(extension(openvino))
    try:
        core.read_model(out / "model.onnx")
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO {target.version} refuses graph {spec.name} of variant {variant.name}: {_reason(error)}",
            fix="leave openvino-cpu out of targets, or this variant out of variants",
        ) from error
    return Built("model.onnx", target, tuple(notes))


def _reason(error: Exception) -> str:
    """The last line that says something: OpenVINO puts its own source lines first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def extension(openvino: Any) -> Any:
    """What core.add_extension() needs so that core.read_model() takes graphs with `medcompile::PagedAttention`.

    Raises BackendUnavailable if this version of the library hides its operator elsewhere.
    """
    from openvino import opset13 as ops

    try:
        from openvino._pyopenvino.op import _PagedAttentionExtension
        from openvino.frontend.onnx import ConversionExtension
    except ImportError as error:
        raise BackendUnavailable(
            f"openvino {openvino.get_version()} has no paged attention where 2026.4 has it: {error}",
            fix="pip install 'openvino==2026.4.*', or build for onnxruntime-cpu",
        ) from error

    def constant(value: Any, dtype: Any) -> Any:
        return ops.constant(np.array(value, dtype)).output(0)

    def none(dtype: Any) -> Any:
        return ops.constant(np.zeros(0, dtype)).output(0)

    def convert(node: Any) -> list[Any]:
        q, k, v, k_pool, v_pool, query_starts, past_lens, block_table = (node.get_input(i) for i in range(8))
        zero, one = constant(0, np.int32), constant(1, np.int32)
        shape = ops.shape_of(block_table, "i32")
        sequences, table = (ops.gather(shape, constant(i, np.int32), zero) for i in (0, 1))
        begins = ops.multiply(ops.range(zero, ops.add(sequences, one), one, "i32"), table)
        ends, starts = (
            ops.slice(query_starts, constant([first], np.int32), constant([last], np.int32), constant([1], np.int32))
            for first, last in ((1, 2**31 - 1), (0, -1))
        )
        lens = ops.add(past_lens, ops.subtract(ends, starts))
        inputs = [
            *(q, k, v, k_pool, v_pool, past_lens, query_starts),
            ops.reshape(block_table, constant([-1], np.int32), False).output(0),
            begins.output(0),
            constant(node.get_attribute("scale"), np.float32),
            constant(node.get_attribute("sliding_window"), np.int32),
            none(np.float32),  # slopes of ALiBi
            ops.reduce_max(lens, constant([0], np.int32), False).output(0),
            none(np.int32),  # score aggregation
            *(none(np.int32), none(np.int32), none(np.float32)),  # rotating blocks that moved
            *(none(np.float32), constant(64, np.int32), constant(8, np.int32)),  # sparse attention
            none(np.float32),  # sinks
            *(constant(0, np.int32), none(np.int32), none(np.int32), none(np.int32)),  # evicting from the cache
            none(np.int32),  # token types
            *(none(np.uint8), none(np.int32)),  # trees of guessed tokens
        ]
        made = _PagedAttentionExtension(inputs)
        info = made.get_rt_info()
        for name in ("num_k_heads", "num_v_heads"):
            info[name] = int(node.get_attribute("kv_heads"))
        for name in ("k_head_size", "v_head_size"):
            info[name] = int(node.get_attribute("head_dim"))
        return [made.output(0)]

    return ConversionExtension("PagedAttention", "medcompile", convert)


class OpenvinoStepModel(HostPools):
    """One compiled decoder, its request, and pools of so many blocks. Not thread-safe: a scheduler steps it alone."""

    block_size = BLOCK_SIZE

    def __init__(self, openvino: Any, path: Path, config: Mapping[str, Any], *, kv: str, blocks: int) -> None:
        """path: the typed graph. config: of compile_model. kv: one of KV_FORMATS. Raises BackendError."""
        super().__init__()
        core = openvino.Core()
        core.add_extension(extension(openvino))
        try:
            model = core.read_model(path)
            for parameter in model.get_parameters():
                if parameter.get_friendly_name().startswith(POOLS):
                    parameter.set_element_type(openvino.Type.dynamic)  # the library's own choice, by the precision
            model.validate_nodes_and_infer_types()
            compiled: ov.CompiledModel = core.compile_model(
                model, "CPU", {**config, "KV_CACHE_PRECISION": KV_FORMATS[kv]}
            )
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO refuses {path.name}: {_reason(error)}",
                fix="build the bundle again with this version of openvino",
            ) from error
        self.blocks = blocks
        self.vocabulary = int(compiled.output(0).partial_shape[1].get_length())
        self._request: ov.InferRequest | None = compiled.create_infer_request()
        for port in compiled.inputs:
            if port.any_name.startswith(POOLS):
                sizes = [dim.get_length() for dim in list(port.partial_shape)[1:]]
                if port.element_type.is_real() and sizes[1] != BLOCK_SIZE:
                    raise BackendError(f"OpenVINO wants blocks of {sizes[1]} tokens for {port.any_name}")
                block_bytes = int(np.prod(sizes)) * port.element_type.bitwidth // 8
                pool = np.zeros((blocks, block_bytes), np.uint8)  # takes memory as blocks are written
                self._request.set_tensor(
                    port.any_name, openvino.Tensor(pool, openvino.Shape([blocks, *sizes]), port.element_type)
                )
                self._pools.append(pool)

    def step(self, batch: StepBatch) -> Array:
        """Compute the batch's new tokens. Returns float32 logits [rows, vocabulary], which the next step overwrites."""
        if self._request is None:
            raise BackendError("this decoder is closed", fix="load the bundle again")
        feeds = {
            "input_ids": batch.input_ids,
            "positions": batch.positions,
            "query_starts": batch.query_starts,
            "past_lens": batch.past_lens,
            "block_table": batch.block_table,
            "logit_rows": batch.logit_rows,
        }
        try:
            result = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed: {_reason(error)}") from error
        logits: Array = result[0]
        return logits

    def close(self) -> None:
        self._request = None
        self._pools = []
