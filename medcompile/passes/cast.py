"""Cast: write the variant's float precision into the graph. float16 and bfloat16, with the fragile parts kept in fp32.

LayerNormalization, Softmax and reductions overflow or lose their sums in 16 bits, so casts to fp32 are put around
them; everything else, weights included, becomes 16-bit. Inputs and outputs of the graph keep their face (float32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from medcompile.errors import PassError
from medcompile.program import Context, Graph, Program
from medcompile.spec import Precision, Stage

if TYPE_CHECKING:
    import onnx_ir as ir

# Sums over many elements, or exponentials: fp16 ends at 65504 and bf16 has 8 bits of mantissa.
_KEPT_OPS = frozenset(
    {"LayerNormalization", "Softmax", "ReduceSum", "ReduceMean", "ReduceMax", "Pow", "Sqrt", "Range", "Div"}
)


@dataclass(frozen=True)
class Cast:
    """keep: glob patterns over names of nodes that stay in fp32, beside the operators that always do."""

    dtype: Precision
    keep: tuple[str, ...] = ()
    name: str = "cast"
    version: int = 1
    needs: Stage = Stage.SIMPLIFIED
    gives: Stage = Stage.TYPED

    def __call__(self, program: Program, ctx: Context) -> Program:
        graphs = {}
        for done, (name, graph) in enumerate(program.graphs.items()):
            ctx.progress.step(name, done, len(program.graphs))
            model = graph.model
            if self.dtype is not Precision.FLOAT32:
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
        for node in list(graph):
            if node.op_type == "Cast" or not any(_is_float(v) for v in (*node.inputs, *node.outputs)):
                continue
            if node.op_type == "QuantizeLinear":
                # x and its scale must agree; x is left as it comes, so that no rounding is added before quantizing.
                self._convert_input(node, 1, _dtype_of(node.inputs[0]))
                continue
            kept = node.op_type in _KEPT_OPS or any(fnmatchcase(node.name or "", k) for k in self.keep)
            dtype = ir.DataType.FLOAT if kept else low
            for i, value in enumerate(node.inputs):
                if _is_float(value):
                    self._convert_input(node, i, dtype)
            for value in node.outputs:
                if _is_float(value):
                    value.dtype = dtype
        for i, value in enumerate(list(graph.outputs)):
            if value.dtype != ir.DataType.FLOAT:
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

        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}.{dtype.name.lower()}"
        lazy = ir.LazyTensor(_rounded(tensor, dtype), dtype, ir.Shape(tensor.shape.numpy()), name=name)
        copy = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=lazy)
        self.model.graph.register_initializer(copy)
        return copy

    def _cast_node(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        import onnx_ir as ir

        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}/Cast")
        result = node.outputs[0]
        result.name, result.dtype, result.shape = f"{value.name}/Cast_output", dtype, value.shape
        producer = value.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, node)
        else:
            self.model.graph.insert_before(self.model.graph[0], node)
        return result


def _is_float(value: ir.Value | None) -> bool:
    import onnx_ir as ir

    return value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _dtype_of(value: ir.Value | None) -> ir.DataType:
    assert value is not None and value.dtype is not None
    return value.dtype


def _rounded(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Callable[[], ir.TensorProtocol]:
    def make() -> ir.TensorProtocol:
        import numpy as np
        import onnx_ir as ir

        array = tensor.numpy()
        with np.errstate(over="ignore"):
            rounded = array.astype(dtype.numpy())
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise PassError(
                f"cast: weight {tensor.name} reaches {np.abs(array).max():.4g}, beyond {dtype.name.lower()}",
                fix="use float: bfloat16 for this variant, or keep the node that uses it",
            )
        return ir.tensor(rounded, dtype=dtype, name=tensor.name)

    return make
