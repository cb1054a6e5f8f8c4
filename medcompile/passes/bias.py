"""Bias correction: what rounding a weight does to the mean of a layer's output, given back as a constant.

    E[x W] - E[x Wq] = E[x] (W - Wq)

The mean of the layer's input is known from calibration. Rounding errors of a column add up where inputs have means
far from zero (behind a Gelu, say), and the sum is a shift that the next layers would see at every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medcompile.passes.edits import constant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.quantizers import Solution
    from medcompile.statistics import Statistics

    Array = np.ndarray[Any, Any]


def mean_lost(weight: Array, solution: Solution, stats: Statistics) -> Array:
    """float32 [outputs]: the mean of x weight less that of the solution's product, for the x that stats describes."""
    import numpy as np

    scales = np.atleast_2d(solution.scales)
    blocks = solution.values.reshape(len(scales), -1, weight.shape[1])
    rounded = (blocks * scales[:, None, :]).reshape(weight.shape)
    mean = stats.channel_mean
    if solution.input_scale is not None:  # the product's input is divided by it
        mean, weight = mean / solution.input_scale, weight * solution.input_scale[:, None]
    lost: Array = (mean @ (weight - rounded).astype(np.float64)).astype(np.float32)
    return lost


def add_to_output(model: ir.Model, node: ir.Node, shift: Array) -> None:
    """Add shift [outputs] to what node, a MatMul, gives: in the bias that follows, or by an Add of its own."""
    import onnx_ir as ir

    output, name = node.outputs[0], f"{node.name}/bias_corrected"
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not output.is_graph_output():
        add, index = uses[0].node, 1 - uses[0].idx
        bias = add.inputs[index]
        stored = bias.const_value if bias is not None else None
        if stored is not None and tuple(stored.shape.numpy()) == shift.shape:
            add.replace_input_with(index, constant(model, name, stored.numpy() + shift))
            return
    add = ir.node("Add", [output, constant(model, f"{name}/shift", shift)], name=name)
    corrected = add.outputs[0]
    corrected.type, corrected.shape = output.type, output.shape
    model.graph.insert_after(node, add)
    for use in uses:
        use.node.replace_input_with(use.idx, corrected)
    for index, value in enumerate(model.graph.outputs):
        if value is output:
            model.graph.outputs[index] = corrected
    # Values are known by name, to statistics and outside.
    corrected.name, output.name = output.name, f"{output.name}/uncorrected"
