"""An encoder that another exporter wrote (Optimum's model.onnx): fitted to the face of our graphs, and as reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.backends import Executor
from medcompile.errors import SourceError
from medcompile.spec import GraphSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

# What exporters call the output that a task is built on.
_OUTPUTS = {
    "embed": "last_hidden_state",
    "token-classification": "logits",
    "sequence-classification": "logits",
    "fill-mask": "logits",
}


def adapt_encoder(model: ir.Model, spec: GraphSpec, pooling: str) -> None:
    """Edit model in place: the inputs of spec in its order, and its one output, pooled or gathered as spec asks.

    Raises SourceError if the model's own inputs or outputs are others than BERT's.
    """
    import onnx_ir as ir

    graph = model.graph
    have = {v.name: v for v in graph.inputs}
    unknown = set(have) - {t.name for t in spec.inputs}
    wanted = _OUTPUTS[spec.name]
    source = next((v for v in graph.outputs if v.name == wanted), None)
    if unknown or source is None:
        raise SourceError(
            f"the ONNX model takes {sorted(str(n) for n in have)} and gives {[v.name for v in graph.outputs]}; "
            f"{spec.name} needs inputs of BERT and the output {wanted}",
            fix=f"export it again for the task {spec.name}",
        )
    for face in spec.inputs:
        if face.name not in have:
            value = ir.Value(name=face.name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(face.shape))
            have[face.name] = value
    graph.inputs[:] = [have[t.name] for t in spec.inputs]
    if source.dtype != ir.DataType.FLOAT:
        raise SourceError(
            f"the ONNX model gives {wanted} as {source.dtype.name.lower() if source.dtype else 'nothing known'}",
            fix="export it again in float32; medcompile makes the 16-bit variants itself",
        )
    if spec.name == "embed":
        result = _pooled(graph, source, have["attention_mask"], pooling)
    elif spec.name == "fill-mask":
        axis = _constant(graph, "mask_position/axis", [1])
        index = _append(graph, "Unsqueeze", [have["mask_position"], axis], {})
        result = _append(graph, "GatherND", [source, index], {"batch_dims": 1})
    else:
        result = source
    if result is not source:
        source.name = f"{wanted}/full"
    face = spec.outputs[0]
    result.name, result.shape = face.name, ir.Shape(face.shape)
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = [result]


def _pooled(graph: ir.Graph, hidden: ir.Value, mask: ir.Value, pooling: str) -> ir.Value:
    """[batch, sequence, hidden] -> [batch, hidden]: the first token, or the mean over real tokens."""
    import onnx_ir as ir

    if pooling == "cls":
        return _append(graph, "Gather", [hidden, _constant(graph, "pool/first", 0)], {"axis": 1})
    axes = _constant(graph, "pool/axes", [1])
    real = _append(graph, "Cast", [mask], {"to": int(ir.DataType.FLOAT)})
    real = _append(graph, "Unsqueeze", [real, _constant(graph, "pool/last", [2])], {})
    total = _append(graph, "ReduceSum", [_append(graph, "Mul", [hidden, real], {}), axes], {"keepdims": 0})
    count = _append(graph, "ReduceSum", [real, axes], {"keepdims": 0})
    return _append(graph, "Div", [total, count], {})


def _append(graph: ir.Graph, op: str, inputs: list[Any], attributes: dict[str, int]) -> ir.Value:
    import onnx_ir as ir

    node = ir.node(op, inputs, attributes, name=f"pool/{op}_{len(graph)}")
    node.outputs[0].name = f"{node.name}_output"
    graph.append(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, value: int | list[int]) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    tensor = ir.tensor(np.array(value, np.int64), name=name)
    constant = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(constant)
    return constant


class ImportedExecutor(Executor):
    """The file itself in ONNX Runtime, unchanged, its answer pooled or gathered in numpy as spec asks."""

    def __init__(self, path: Path, spec: GraphSpec, pooling: str) -> None:
        from medcompile.run_onnx import session

        super().__init__(spec)
        self._pooling = pooling
        self._session: Any = session(path)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import numpy as np

        own = {i.name: feeds[i.name] for i in self._session.get_inputs()}
        (result,) = self._session.run([_OUTPUTS[self.spec.name]], own)
        if self.spec.name == "fill-mask":
            result = result[np.arange(len(result)), feeds["mask_position"]]
        elif self.spec.name == "embed" and self._pooling == "cls":
            result = result[:, 0]
        elif self.spec.name == "embed":
            real = feeds["attention_mask"][:, :, None].astype(np.float32)
            result = (result * real).sum(1) / real.sum(1)
        return {self.spec.outputs[0].name: result}

    def close(self) -> None:
        self._session = None
