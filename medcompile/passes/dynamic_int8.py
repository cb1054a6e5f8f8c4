"""Dynamic INT8 in standard operators: every token's row of activations is rounded with a scale of its own.

    scale = max|x| / 127 over the last axis        q = uint8(round(x / scale) + 128)
    y = MatMulInteger(q, w, 128) * scale * weight scales

uint8 around 128 holds the same codes as int8 around 0, and is the form that has fast kernels on every CPU. Scales per
token need no calibration and no token can spoil another's, whatever its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medcompile.passes.edits import constant, insert

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

# An all-zero row gets this scale: above zero, and small enough that no real row comes near it.
_LEAST_SCALE = 1e-12


def dynamic_matmuls(
    model: ir.Model, nodes: Sequence[ir.Node], activation: ir.Value, values: Sequence[Array], scales: Sequence[Array]
) -> None:
    """Replace nodes, MatMuls that read one activation, by integer products that share one rounding of it.

    values: int8 [channels, n] and scales: float32 [n] of each node's weight.
    """
    import numpy as np
    import onnx_ir as ir

    first, base = nodes[0], activation.name or ""

    def shared(name: str, array: Array) -> ir.Value:
        found = model.graph.initializers.get(name)
        return found if found is not None else constant(model, name, array)

    last_axis = shared("dynamic_int8/last_axis", np.array([-1], np.int64))
    step = shared("dynamic_int8/step", np.array(1 / 127, np.float32))
    least = shared("dynamic_int8/least_scale", np.array(_LEAST_SCALE, np.float32))
    middle = shared("dynamic_int8/middle", np.array(128, np.float32))
    zero_point = shared("dynamic_int8/zero_point", np.array(128, np.uint8))

    magnitude = insert(model, first, "Abs", [activation], f"{base}/abs")
    amax = insert(model, first, "ReduceMax", [magnitude, last_axis], f"{base}/amax", attributes={"keepdims": 1})
    if activation.shape is not None:
        amax.shape = ir.Shape([*activation.shape[:-1], 1])
    rows = insert(model, first, "Mul", [amax, step], f"{base}/row_scale")
    rows = insert(model, first, "Max", [rows, least], f"{base}/row_scale_positive")
    codes = insert(model, first, "Div", [activation, rows], f"{base}/divide")
    codes = insert(model, first, "Round", [codes], f"{base}/round")
    codes = insert(model, first, "Add", [codes, middle], f"{base}/shift")
    codes = insert(model, first, "Cast", [codes], f"{base}/codes", attributes={"to": zero_point.dtype})
    for node, value, scale in zip(nodes, values, scales, strict=True):
        name = node.name or ""
        weight = constant(model, f"{name}/weight", value)
        old = node.outputs[0]
        product = insert(model, node, "MatMulInteger", [codes, weight, zero_point], f"{name}/integer", like=old)
        output = insert(model, node, "Cast", [product], f"{name}/cast", attributes={"to": activation.dtype})
        output = insert(model, node, "Mul", [output, rows], f"{name}/by_row")
        output = insert(
            model, node, "Mul", [output, constant(model, f"{name}/weight_scale", scale)], f"{name}/by_column"
        )
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        # The graph's own outputs are known by name.
        output.name, old.name = old.name, None
        model.graph.remove(node, safe=True)
