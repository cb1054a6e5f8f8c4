"""Paged attention in a typed graph: its nodes, and pools bound to them uncast, for dialects that update in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medcompile.errors import BackendError
from medcompile.rewrites import insert

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from medcompile.kernels.launches import Float

DOMAIN, OPERATOR = "medcompile", "PagedAttention"
POOLS = (3, 4)
"""The operator's inputs that are pools: keys, values."""
_TYPES: dict[str, str] = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT"}


def nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]


def sizes(node: ir.Node) -> tuple[int, int, int]:
    """heads, kv_heads and head_dim of a node."""
    heads, kv_heads, head_dim = (node.attributes[name].as_int() for name in ("heads", "kv_heads", "head_dim"))
    return heads, kv_heads, head_dim


def bind_pools(model: ir.Model, node: ir.Node, dtype: Float, block_shape: Sequence[int | str]) -> list[ir.Value]:
    """Bind a node's pools to it as inputs of the graph of that dtype and [blocks, *block_shape].

    A cast on the way goes: it would be a copy, and what is written into a copy is lost.
    Raises BackendError where a pool is no input of the graph.
    """
    import onnx_ir as ir

    pools = []
    for index in POOLS:
        pool = node.inputs[index]
        cast = pool.producer() if pool is not None else None
        if cast is not None and cast.op_type == "Cast":
            pool = cast.inputs[0]
        if pool is None or pool not in model.graph.inputs:
            raise BackendError(
                f"input {index} of {node.name}, a pool of keys or values, is no input of the graph",
                fix="build the graph by models/llama.py, which binds pools so",
            )
        pool.type = ir.TensorType(ir.DataType[_TYPES[dtype]])
        pool.shape = ir.Shape([pool.shape[0] if pool.shape else None, *block_shape])
        node.replace_input_with(index, pool)
        if cast is not None and not cast.outputs[0].uses():
            model.graph.remove(cast, safe=True)
        pools.append(pool)
    return pools


def as_float32(model: ir.Model, node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, cast to float32 in front of it where it is another float."""
    import onnx_ir as ir

    value = node.inputs[index]
    if value is None or value.dtype in (None, ir.DataType.FLOAT):
        return value
    return insert(model, node, "Cast", [value], f"{_name(node)}/float32_{index}", {"to": int(ir.DataType.FLOAT)})


def as_result(model: ir.Model, node: ir.Node, out: ir.Value) -> ir.Value:
    """The float32 value that is to take the place of a node's output, cast to that output's float."""
    import onnx_ir as ir

    dtype = node.outputs[0].dtype
    if dtype in (None, ir.DataType.FLOAT):
        return out
    return insert(model, node, "Cast", [out], f"{_name(node)}/cast", {"to": int(dtype)})


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)
