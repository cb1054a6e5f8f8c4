"""FP8 in standard operators: E4M3 activations and weights, each tensor with one scale from its largest magnitude.

E4M3 has three bits of mantissa and spans 18 powers of two, so that a clipped tail costs more than it buys and
channels of very different size keep their relative precision: there is no range to search and nothing to smooth.
For TensorRT, on GPUs that have FP8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medcompile.errors import QuantizeError
from medcompile.passes.edits import constant, insert

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.passes.linear import LinearGroup
    from medcompile.statistics import Statistics

    Array = np.ndarray[Any, Any]

_LARGEST = 448.0
"""The largest finite E4M3 number. Source: FP8 Formats for Deep Learning (2022), table 1."""


def float8_matmuls(model: ir.Model, group: LinearGroup, stats: Statistics) -> None:
    """Let the group's MatMuls read an E4M3 form of their input and of their weights.

    stats: of the input, which all of them share. Raises QuantizeError if a weight holds NaN or Inf, naming the node.
    """
    import ml_dtypes
    import numpy as np

    from medcompile.passes.derived import read

    first = group.nodes[0]
    activation = first.inputs[0]
    assert activation is not None
    amax = max(float(-stats.channel_min.min()), float(stats.channel_max.max()), 0.0)
    zero = constant(model, f"{group.tensor}/zero_point", np.array(0, ml_dtypes.float8_e4m3fn))
    scale = constant(model, f"{group.tensor}/scale", _scale(amax))
    codes = insert(model, first, "QuantizeLinear", [activation, scale, zero], f"{group.tensor}/quantize")
    activation = insert(model, first, "DequantizeLinear", [codes, scale, zero], f"{group.tensor}/dequantize")
    for node in group.nodes:
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        array, base = read(weight.const_value), node.name or ""
        amax = float(np.abs(array).max())
        if not np.isfinite(amax):
            raise QuantizeError(
                f"{base}: the weight holds NaN or Inf", fix="check the checkpoint: its weights are damaged"
            )
        step = _scale(amax)
        inputs = [
            constant(model, f"{base}/weight", (array / step).astype(ml_dtypes.float8_e4m3fn)),
            constant(model, f"{base}/weight_scale", step),
            constant(model, f"{base}/weight_zero_point", np.array(0, ml_dtypes.float8_e4m3fn)),
        ]
        node.replace_input_with(0, activation)
        node.replace_input_with(1, insert(model, node, "DequantizeLinear", inputs, f"{base}/weight_dequantize"))


def _scale(amax: float) -> Array:
    import numpy as np

    return np.array(amax / _LARGEST if amax else 1.0, np.float32)
