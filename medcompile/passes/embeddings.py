"""Embeddings in int8: the table that tokens are looked up in, stored as integers with one scale per token.

A few looked-up rows are turned into floats, never the table. Positions and rotary angles stay as they are: their
tables are small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medcompile.errors import QuantizeError
from medcompile.passes.edits import constant, insert

if TYPE_CHECKING:
    import onnx_ir as ir

_SHAPING = frozenset({"Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity"})


def quantize_embeddings(model: ir.Model) -> None:
    """Write every look-up of input_ids in a stored float table as one in int8, in place.

    Raises QuantizeError if there is none, or if a table holds NaN or Inf.
    """
    import onnx_ir as ir

    from medcompile.passes.derived import read
    from medcompile.quantizers.rtn import round_to_nearest

    found = [node for node in model.graph if _looks_up_tokens(node)]
    if not found:
        raise QuantizeError(
            f"graph {model.graph.name} looks up no tokens, so it has no embeddings",
            fix="leave out embeddings, or name the graphs with tokens under the variant's graphs",
        )
    for node in found:
        table, ids = node.inputs
        assert table is not None and table.const_value is not None and ids is not None
        codes, scales = round_to_nearest(read(table.const_value).T, 8, None)
        stored = constant(model, f"{table.name}/int8", codes.T)
        steps = constant(model, f"{table.name}/scale", scales[:, None])
        base, out = node.name, node.outputs[0]
        rows = insert(model, node, "Gather", [stored, ids], f"{base}/codes", attributes={"axis": 0}, like=out)
        rows = insert(model, node, "Cast", [rows], f"{base}/float", attributes={"to": int(ir.DataType.FLOAT)}, like=out)
        step = insert(model, node, "Gather", [steps, ids], f"{base}/scales", attributes={"axis": 0}, like=out)
        assert out.shape is not None
        step.shape = ir.Shape([*list(out.shape)[:-1], 1])
        scaled = insert(model, node, "Mul", [rows, step], f"{base}/scaled", like=out)
        out.replace_all_uses_with(scaled, replace_graph_outputs=True)


def _looks_up_tokens(node: ir.Node) -> bool:
    """True for a Gather of rows of a stored float matrix by the graph's input_ids, reshaped at most."""
    import onnx_ir as ir

    if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
        return False
    table, ids = node.inputs
    if table is None or table.const_value is None or table.dtype != ir.DataType.FLOAT or len(table.shape or ()) != 2:
        return False
    while ids is not None and (producer := ids.producer()) is not None and producer.op_type in _SHAPING:
        ids = producer.inputs[0]
    return ids is not None and ids.is_graph_input() and ids.name == "input_ids"
