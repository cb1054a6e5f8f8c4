"""Simplify: bring an exported graph into the one shape that every later pass and backend relies on.

Afterwards weights of linear layers lie [K, N] in fp32 and feed MatMul input 1 directly, shapes of Reshape are
constants wherever they can be, dynamic axes carry the names of the graph's face, and nothing unused is left.
Weights are turned lazily, one at a time as they are written; none is held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcompile.program import Context, Graph, Program
from medcompile.spec import GraphSpec, Stage

if TYPE_CHECKING:
    import onnx_ir as ir

# Constants above this many bytes are left to _turn_weights, which reads them lazily.
_FOLD_LIMIT_BYTES = 16_384


@dataclass(frozen=True)
class Simplify:
    name: str = "simplify"
    version: int = 3
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
    import onnx_ir as ir
    from onnx_ir.passes import common

    from medcompile.passes.fuse import fuse

    fuse(model)  # first, for the optimizer drops an epsilon of 1e-12 as if it were 0
    _optimize(model)
    _name_axes(model, spec)
    _plain_linears(model)
    _turn_weights(model)
    _constant_reshapes(model)
    common.IdentityEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _name_values(model)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()  # the passes above have mapped some, and each holds a file open


def _optimize(model: ir.Model) -> None:
    """onnxscript's optimizer, but for one of its rules: SlicesSplit compares every node with every other, which takes
    minutes where a decoder has thousands."""
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter

    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"]
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=_FOLD_LIMIT_BYTES,
            output_size_limit=_FOLD_LIMIT_BYTES,
            should_fold=lambda node: False if _turns_weight(node) else None,
        )
        rewriter.RewritePass(rules)(model)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Rename torch's symbols (s18, s41) to the axis names of the face, in every shape of the graph; others become
    unknown."""
    import onnx_ir as ir

    names = {dim: dim for face in spec.inputs for dim in face.shape if isinstance(dim, str)}
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
                value.shape = ir.Shape([d if isinstance(d, int) else names.get(str(d.value)) for d in value.shape])


def _turns_weight(node: ir.Node) -> bool:
    """True for a Cast or matrix Transpose of a stored weight, which folding would compute in memory."""
    import onnx_ir as ir

    if node.op_type not in ("Cast", "Transpose") or node.domain:
        return False
    tensor = node.inputs[0].const_value if node.inputs[0] is not None else None
    if tensor is None or (node.op_type == "Transpose" and len(tensor.shape) != 2):
        return False
    return isinstance(tensor, ir.ExternalTensor | ir.LazyTensor) or tensor.nbytes > _FOLD_LIMIT_BYTES


def _plain_linears(model: ir.Model) -> None:
    """Write a Gemm over a stored matrix as MatMul and Add, so that all linear layers look alike.

    torch traces poolers and heads, which see one row per text, as Gemm. They are named after their weight's module.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        if node.op_type != "Gemm" or node.domain:
            continue
        left, weight, *bias = node.inputs
        attributes = {name: value.value for name, value in node.attributes.items()}
        if left is None or weight is None or weight.const_value is None or attributes.pop("transA", 0):
            continue
        if attributes.pop("alpha", 1.0) != 1.0 or attributes.pop("beta", 1.0) != 1.0:
            continue
        if attributes.pop("transB", 0):
            weight = _derived(graph, weight, transposed=True)
        path = (node.inputs[1].name or "").removesuffix(".T")  # type: ignore[union-attr]
        path = path.removesuffix(".weight") if path.endswith(".weight") else (node.name or "").removesuffix("/Gemm")
        out = node.outputs[0]
        last = product = ir.node("MatMul", [left, weight], name=f"{path}/MatMul")
        made = [product]
        if bias and bias[0] is not None:
            last = ir.node("Add", [product.outputs[0], bias[0]], name=f"{path}/Add")
            made.append(last)
        for one in made:
            one.outputs[0].type, one.outputs[0].shape = out.type, out.shape
        graph.insert_before(node, made)
        out.replace_all_uses_with(last.outputs[0], replace_graph_outputs=True)
        last.outputs[0].name, out.name = out.name, None
        graph.remove(node, safe=True)


def _turn_weights(model: ir.Model) -> None:
    """Replace Cast and matrix Transpose of an initializer by the turned initializer, evaluated when it is written."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if (
            not _turns_weight(node)
            or source is None
            or not source.is_initializer()
            or node.outputs[0].is_graph_output()
        ):
            continue
        if node.op_type == "Cast":
            turned = _derived(graph, source, dtype=ir.DataType(node.attributes["to"].as_int()))
        else:
            turned = _derived(graph, source, transposed=True)
        node.outputs[0].replace_all_uses_with(turned)
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _derived(
    graph: ir.Graph, source: ir.Value, *, dtype: ir.DataType | None = None, transposed: bool = False
) -> ir.Value:
    """The initializer that is source in dtype or transposed: `query.weight.T`, `query.weight.float`."""
    import onnx_ir as ir

    from medcompile.passes.derived import Derived

    assert source.const_value is not None
    dtype = dtype or source.const_value.dtype
    name = f"{source.name}.{'T' if transposed else dtype.name.lower()}"
    if name not in graph.initializers:
        tensor = Derived(source.const_value, dtype, transposed=transposed, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


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
        constant.type, constant.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(dims)])
        model.graph.register_initializer(constant)
        node.replace_input_with(1, constant)
        node.attributes.pop("allowzero", None)  # under allowzero a 0 would mean an empty axis


def _name_values(model: ir.Model) -> None:
    """Stable names: values are called after the node that makes them."""
    graph = model.graph
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
