"""Cast: write the variant's float precision into the graph. float16 and bfloat16, with the fragile parts kept in fp32.

LayerNormalization, Softmax and reductions overflow or lose their sums in 16 bits, so casts to fp32 are put around
them; everything else, weights included, becomes 16-bit. Inputs and outputs of the graph keep their face (float32).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medcompile.program import Context, Graph, Program
from medcompile.spec import Precision, Stage, kept

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

# Sums over many elements, or exponentials: fp16 ends at 65504 and bf16 has 8 bits of mantissa.
_KEPT_OPS = frozenset(
    {"LayerNormalization", "Softmax", "ReduceSum", "ReduceMean", "ReduceMax", "Pow", "Sqrt", "Range", "Div", "Clip"}
    | {"Reciprocal"}
)
# What passes/dynamic_int8.py writes before a MatMulInteger, and how many values after it: sum, cast, by row, by column.
_ROUNDING_OPS = frozenset({"Cast", "Add", "Round", "Div", "Max", "Mul", "ReduceMax"})
_SCALINGS = 4


@dataclass(frozen=True)
class Cast:
    """keep: glob patterns over names of nodes that stay in fp32 (as in Quantize), beside the operators that always do.

    graphs: only these are cast; empty is all.

    Raises PassError naming a weight that goes beyond the dtype, when the result is written.
    """

    dtype: Precision
    keep: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    name: str = "cast"
    version: int = 2
    needs: Stage = Stage.SIMPLIFIED
    gives: Stage = Stage.TYPED

    def __call__(self, program: Program, ctx: Context) -> Program:
        graphs = {}
        for done, (name, graph) in enumerate(program.graphs.items()):
            ctx.progress.step(name, done, len(program.graphs))
            model = graph.model
            if self.dtype is not Precision.FLOAT32 and (not self.graphs or name in self.graphs):
                model = model.clone()
                _Lowering(model, self.dtype, self.keep).run()
            graphs[name] = Graph(graph.spec, model)
        return program.with_graphs(graphs, self.gives)


@dataclass
class _Lowering:
    """One walk over a graph in topological order; converted holds each value's form in the other dtype."""

    model: ir.Model
    dtype: Precision
    keep: tuple[str, ...]
    converted: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def run(self) -> None:
        import onnx_ir as ir

        low = ir.DataType.FLOAT16 if self.dtype is Precision.FLOAT16 else ir.DataType.BFLOAT16
        graph = self.model.graph
        rounding = _dynamic_rounding(graph)
        for node in list(graph):
            if node.op_type == "Cast" or not any(_is_float(v) for v in node.inputs):
                continue
            in_float32 = node.op_type in _KEPT_OPS or node in rounding or kept(node.name or "", self.keep)
            in_float32 |= _feeds_root(node)
            if node.op_type == "QuantizeLinear":
                # x is left as it comes, so that no rounding is added before quantizing; its scale must be of its type.
                in_float32 = _dtype_of(node.inputs[0]) is ir.DataType.FLOAT or not _holds(node.inputs[1], low)
            elif node.op_type == "DequantizeLinear":
                in_float32 = not _holds(node.inputs[1], low)
            dtype = ir.DataType.FLOAT if in_float32 else low
            for i, value in enumerate(node.inputs):
                # Pools of keys and values, the graph's own inputs, are of whatever type their backend keeps them in.
                if _is_float(value) and not (node.op_type == "PagedAttention" and value in graph.inputs):
                    self._convert_input(node, i, dtype)
            for value in node.outputs:
                if _is_float(value):
                    value.type = ir.TensorType(dtype)  # clones share the type's object: replace it, never edit it
        for i, value in enumerate(list(graph.outputs)):
            if value.dtype == low:
                name, value.name = value.name, f"{value.name}/{low.name.lower()}"
                cast = self._cast_node(value, ir.DataType.FLOAT)
                cast.name = name
                graph.outputs[i] = cast
        for name, value in list(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[name]

    def _convert_input(self, node: ir.Node, index: int, dtype: ir.DataType) -> None:
        value = node.inputs[index]
        assert value is not None
        if value.dtype == dtype:
            return
        if value not in self.converted:
            self.converted[value] = (
                self._weight(value, dtype) if value.const_value is not None else self._cast_node(value, dtype)
            )
        node.replace_input_with(index, self.converted[value])

    def _weight(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A copy of an initializer in dtype, made when it is written."""
        import onnx_ir as ir

        from medcompile.passes.derived import Derived

        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}.{dtype.name.lower()}"
        made: ir.TensorProtocol = Derived(tensor, dtype, name=name)
        if tensor.size == 1:
            made = ir.Tensor(_scalar(tensor, dtype), dtype=dtype, name=name)
        copy = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=made)
        self.model.graph.register_initializer(copy)
        return copy

    def _cast_node(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        import onnx_ir as ir

        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}/Cast")
        result = node.outputs[0]
        result.name, result.shape = f"{value.name}/Cast_output", value.shape
        result.type = ir.TensorType(dtype)
        producer = value.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, node)
        else:
            self.model.graph.insert_before(self.model.graph[0], node)
        return result


def _feeds_root(node: ir.Node) -> bool:
    """An RMS norm's mean square plus epsilon: what it adds up passes 65504 long before its root does."""
    return node.op_type == "Add" and any(use.node.op_type == "Sqrt" for use in node.outputs[0].uses())


def _is_float(value: ir.Value | None) -> bool:
    import onnx_ir as ir

    return value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _dtype_of(value: ir.Value | None) -> ir.DataType:
    assert value is not None and value.dtype is not None
    return value.dtype


def _scalar(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Array:
    """A single number rounded to dtype. One beyond its range means "as good as infinite" (a mask's), and is clipped."""
    import ml_dtypes
    import numpy as np

    limit = float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
    number: Array = np.clip(tensor.numpy(), -limit, limit).astype(dtype.numpy())
    return number


def _holds(scale: ir.Value | None, dtype: ir.DataType) -> bool:
    """True if dtype gives every positive scale with its full mantissa: tiny ones would lose bits, or become 0."""
    import ml_dtypes
    import numpy as np

    if scale is None or scale.const_value is None:
        return False
    array = np.abs(scale.const_value.numpy().astype(np.float32))
    info = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    return bool((array <= float(info.max)).all() and (array[array > 0] >= float(info.smallest_normal)).all())


def _dynamic_rounding(graph: ir.Graph) -> set[ir.Node]:
    """The arithmetic around each MatMulInteger: from the row's magnitude to its codes, and from the int32 sums to the
    result. A scale rounded to 16 bits would push codes past 255, where they wrap, and sums pass 65504 easily."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type != "MatMulInteger":
            continue
        before = [node.inputs[0]]
        for value in before:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.op_type in _ROUNDING_OPS and producer not in found:
                found.add(producer)
                # Div's first input is the activation itself: there the rounding begins.
                before += producer.inputs[1:] if producer.op_type == "Div" else producer.inputs[:1]
        after = list(node.outputs)
        for value in after:
            for user, _ in value.uses():
                if user.op_type in ("Cast", "Mul") and len(after) < _SCALINGS:
                    found.add(user)
                    after += user.outputs
    return found
