"""Simplify: bring an exported graph into the one shape that every later pass and backend relies on.

Afterwards weights of linear layers lie [K, N] in fp32 and feed MatMul input 1 directly, shapes of Reshape are
constants wherever they can be, dynamic axes carry the names of the graph's face, and nothing unused is left.
Weights are turned lazily, one at a time as they are written; none is held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcompile.program import Context, Graph, Program
from medcompile.spec import GraphSpec, Stage

if TYPE_CHECKING:
    import onnx_ir as ir

# Constants above this many bytes are left to _turn_weights, which reads them lazily.
_FOLD_LIMIT_BYTES = 16_384


@dataclass(frozen=True)
class Simplify:
    name: str = "simplify"
    version: int = 1
    needs: Stage = Stage.EXPORTED
    gives: Stage = Stage.SIMPLIFIED

    def __call__(self, program: Program, ctx: Context) -> Program:
        graphs = {}
        for done, (name, graph) in enumerate(program.graphs.items()):
            ctx.progress.step(name, done, len(program.graphs))
            model = graph.model.clone()
            _simplify(model, graph.spec)
            graphs[name] = Graph(graph.spec, model)
        return program.with_graphs(graphs, self.gives)


def _simplify(model: ir.Model, spec: GraphSpec) -> None:
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize_ir

    optimize_ir(
        model,
        input_size_limit=_FOLD_LIMIT_BYTES,
        output_size_limit=_FOLD_LIMIT_BYTES,
        should_fold=lambda node: False if _turns_weight(node) else None,
    )
    _name_axes(model, spec)
    _turn_weights(model)
    _constant_reshapes(model)
    common.IdentityEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _name_values(model)


def _name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Rename torch's symbols (s18, s41) to the axis names of the face, in every shape of the graph."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, face in zip(model.graph.inputs, spec.inputs, strict=True):
        if value.shape is not None:
            for dim, wanted in zip(value.shape, face.shape, strict=True):
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None and isinstance(wanted, str):
                    names[str(dim.value)] = wanted
        value.shape = ir.Shape(face.shape)
    for value, face in zip(model.graph.outputs, spec.outputs, strict=True):
        value.shape = ir.Shape(face.shape)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = ir.Shape(
                    [names.get(str(d.value), d.value) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
                )


def _turns_weight(node: ir.Node) -> bool:
    """True for a Cast or Transpose of a large initializer, which would be computed in memory if folded."""
    source = node.inputs[0] if node.op_type in ("Cast", "Transpose") and not node.domain else None
    return source is not None and source.const_value is not None and source.const_value.nbytes > _FOLD_LIMIT_BYTES


def _turn_weights(model: ir.Model) -> None:
    """Replace Cast and Transpose of an initializer by the turned initializer, evaluated when it is written."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        if node.op_type not in ("Cast", "Transpose") or node.domain or len(node.inputs) != 1:
            continue
        source = node.inputs[0]
        if source is None or source.const_value is None or not source.is_initializer():
            continue
        result = node.outputs[0]
        if result.is_graph_output():
            continue
        tensor = source.const_value
        if node.op_type == "Cast":
            dtype = ir.DataType(node.attributes["to"].as_int())
            shape, turned = ir.Shape(tensor.shape.numpy()), _cast(tensor, dtype)
        else:
            dtype = tensor.dtype
            sizes = tensor.shape.numpy()
            default = list(range(len(sizes)))[::-1]
            order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else default
            shape = ir.Shape([sizes[i] for i in order])
            turned = _transposed(tensor, order)
        name = f"{source.name}.{'T' if node.op_type == 'Transpose' else dtype.name.lower()}"
        if name not in graph.initializers:
            lazy = ir.LazyTensor(turned, dtype, shape, name=name)
            graph.register_initializer(ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy))
        result.replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _cast(tensor: Any, dtype: ir.DataType) -> Any:
    import onnx_ir as ir

    return lambda: ir.tensor(tensor.numpy().astype(dtype.numpy()))


def _transposed(tensor: Any, order: list[int]) -> Any:
    import numpy as np
    import onnx_ir as ir

    return lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), dtype=tensor.dtype)


def _constant_reshapes(model: ir.Model) -> None:
    """Give Reshape a constant shape where every output axis is static, the input's own axis, or the only other one.

    In ONNX a 0 copies the input's axis at that place, and a -1 takes the rest.
    """
    import numpy as np
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain or node.inputs[1] is None or node.inputs[0] is None:
            continue
        data, shape, out = node.inputs[0], node.inputs[1], node.outputs[0]
        if shape.const_value is not None or data.shape is None or out.shape is None:
            continue
        dims: list[int] = []
        for i, dim in enumerate(out.shape):
            if isinstance(dim, int):
                dims.append(dim)
            elif i < len(data.shape) and data.shape[i] == dim and dim.value is not None:
                dims.append(0)
            else:
                dims.append(-1)
        if dims.count(-1) > 1:
            continue
        name = f"{node.name}/shape"
        constant = ir.Value(name=name, const_value=ir.tensor(np.array(dims, np.int64), name=name))
        constant.dtype, constant.shape = ir.DataType.INT64, ir.Shape([len(dims)])
        model.graph.register_initializer(constant)
        node.replace_input_with(1, constant)
        node.attributes.pop("allowzero", None)  # under allowzero a 0 would mean an empty axis


def _name_values(model: ir.Model) -> None:
    """Stable names: initializers lose the wrapper's prefix, values are called after the node that makes them."""
    graph = model.graph
    for name in list(graph.initializers):
        value = graph.initializers[name]
        short = name.removeprefix("model.")
        if short != name and short not in graph.initializers:
            value.name = short
            if value.const_value is not None:
                value.const_value.name = short
    taken: set[str] = set()
    for node in graph:
        base = node.name if node.name and not node.name.startswith("node_") else f"model/{node.op_type}"
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name
    outputs = {id(v) for v in graph.outputs}
    for node in graph:
        for i, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = f"{node.name}_output" + (f"_{i}" if i else "")
