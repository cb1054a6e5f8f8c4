"""Rewrites: from the typed graph into a backend's own, faster dialect, at build time.

One file per dialect, called by the backend's build(). What a rewrite finds it finds by structure, not by name, and a
pattern that is not there leaves the graph as it was: every backend runs the standard operators too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medcompile.passes import edits

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of that standard operator that makes value, or None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads value, once, if it is of that standard operator; None where value leaves the graph."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def stored(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The array of an initializer, memory-mapped where it is large; None for what the graph computes."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a binary node that is not value."""
    first, second = node.inputs
    return second if first is value else first


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let new take old's place everywhere. Where old leaves the graph, new leaves it under that name."""
    name, leaves = old.name, old.is_graph_output()
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if leaves:
        old.name = f"{name}/replaced"
        new.name = name


def constant(model: ir.Model, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """The initializer called name, registered with array if there is none yet."""
    found = model.graph.initializers.get(name)
    return edits.constant(model, name, array) if found is None else found


def ints(model: ir.Model, *numbers: int) -> ir.Value:
    """The initializer of those int64 numbers: a shape, axes."""
    import numpy as np

    return constant(model, f"dims/{'_'.join(map(str, numbers))}", np.array(numbers, np.int64))


TURN = [0, 2, 1, 3]
"""The transpose that puts heads before tokens, and back."""


def perm(turn: ir.Node) -> list[int]:
    """How a Transpose orders axes."""
    return list(turn.attributes["perm"].as_ints())


def insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    name: str,
    attributes: dict[str, Any] | None = None,
    domain: str = "",
) -> ir.Value:
    """Put a node with one output in front of another, and return that output."""
    import onnx_ir as ir

    node = ir.node(op_type, inputs, attributes or {}, domain=domain, name=name)
    node.outputs[0].name = f"{name}/output"
    model.graph.insert_before(before, node)
    return node.outputs[0]
