"""Export: a checkpoint becomes onnx_ir graphs whose weights are references into the checkpoint's safetensors file.

Nothing here reads a weight: tracing runs over fake tensors, and each parameter becomes an ExternalTensor (file,
offset, length) in its stored dtype, with a Cast where the graph computes in fp32. Copies begin in simplify.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medcompile.errors import PassError, SourceError
from medcompile.models import Family, ModelOptions, Traced
from medcompile.program import Graph, Program
from medcompile.spec import GraphSpec, Stage

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.sources import Checkpoint

VERSION = 2
OPSET = 21  # the first with block-wise INT4 DequantizeLinear
_REWRITTEN = 18  # below this onnxscript's converter leaves attributes that became inputs; onnx's own does not


def export(family: Family, checkpoint: Checkpoint, options: ModelOptions) -> Program:
    """One graph per task, at Stage.EXPORTED. Raises SourceError, ProfileError, or PassError naming the graph."""
    from medcompile import sources

    graphs: dict[str, Graph] = {}
    stored, kept = sources.stored(checkpoint), {}
    for task in options.tasks:
        spec = family.graph_spec(checkpoint, task, options)
        if checkpoint.kind == "onnx":
            model = _imported(checkpoint, spec)
            family.adapt(model, checkpoint, task, options)
        else:
            model, names = _traced(family, checkpoint, task, options, spec)
            kept[task] = {ours: stored[theirs] for ours, theirs in names.items() if theirs in stored}
        graphs[task] = Graph(spec, model)
    return Program(family.name, graphs, Stage.EXPORTED, stored=kept if stored else {})


def _traced(
    family: Family, checkpoint: Checkpoint, task: str, options: ModelOptions, spec: GraphSpec
) -> tuple[ir.Model, dict[str, str]]:
    """The graph, and by the name of each of its parameters what the checkpoint calls it."""
    import torch

    from medcompile import sources

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of libraries that a text model has no use for
    tensors = sources.tensors(checkpoint)
    traced = family.trace(checkpoint, tensors, task, options)
    program = torch.onnx.export(
        traced.exported,
        dynamo=True,
        optimize=False,  # constant folding would look into weights that are not there yet
        opset_version=OPSET,
        input_names=[t.name for t in spec.inputs],
        output_names=[t.name for t in spec.outputs],
        verbose=False,
    )
    if program is None:
        raise PassError(f"export: {task}: torch.onnx gave no program", fix="run with -v and look at torch's messages")
    model: ir.Model = program.model
    _name_nodes(model, traced.prefixes)
    _bind(model, traced, tensors, task)
    for name, value in list(model.graph.initializers.items()):
        value.name = _without(name, traced.prefixes)
    _strip(model)
    model.graph.name = task
    model.producer_name, model.producer_version = "medcompile", ""
    return model, {_without(ours, traced.prefixes): theirs for ours, theirs in traced.parameters.items()}


def _bind(model: ir.Model, traced: Traced, tensors: Mapping[str, Any], task: str) -> None:
    """Point every initializer at its bytes in the checkpoint, or at what the family computed. One that has no bytes is
    a fault of the family's file."""
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    casts: list[ir.Node] = []
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
            continue
        if name in traced.constants:
            value.const_value = ir.Tensor(traced.constants[name], name=name)
            continue
        stored = traced.parameters.get(name)
        if stored is None:
            raise PassError(
                f"export: {task}: the graph holds {name}, which no tensor of the checkpoint gives",
                fix="the family's trace() must compute this buffer in forward(), or map it to a tensor",
            )
        ref = tensors[stored]
        wanted = value.dtype
        dtype = ir.DataType.from_numpy(np.dtype(getattr(ml_dtypes, ref.dtype, ref.dtype)))
        value.const_value = ir.ExternalTensor(
            ref.file.name,
            ref.offset,
            ref.nbytes,
            dtype,
            shape=value.shape or ir.Shape(ref.shape),  # a patch embedding is asked for flat
            name=name,
            base_dir=ref.file.parent,
        )
        value.type = ir.TensorType(dtype)
        if wanted is not None and dtype != wanted:
            cast = ir.node("Cast", [value], {"to": wanted}, name=f"{name}/Cast")
            cast.outputs[0].name = f"{name}/Cast_output"
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(wanted), value.shape
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            casts.append(cast)
    first = graph[0]
    for cast in casts:
        graph.insert_before(first, cast)


def _without(path: str, prefixes: tuple[str, ...]) -> str:
    """path less the first of prefixes that it begins with."""
    return next((path.removeprefix(p) for p in prefixes if path.startswith(p)), path)


def _name_nodes(model: ir.Model, prefixes: tuple[str, ...]) -> None:
    """Give nodes and values names that say where they come from: `encoder.layer.3.output.dense/MatMul`.

    torch numbers its nodes through; the module path that it leaves in the metadata is what people know a layer by.
    """
    seen: dict[str, int] = {}
    for node in model.graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        path = next((s for s in reversed(scopes[:-1]) if s and not s.startswith("_")), "model")
        path = _without(path, prefixes)
        name = f"{path}/{node.op_type}"
        count = seen[name] = seen.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name
        for i, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"{node.name}_output" + (f"_{i}" if i else "")


def _strip(model: ir.Model) -> None:
    """Drop what the exporter notes beside the graph: source paths of this machine, which would change digests."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _imported(checkpoint: Checkpoint, spec: GraphSpec) -> ir.Model:
    """The ONNX model of an exported folder, raised to this compiler's opset, shapes told in the face's axis names."""
    import onnx_ir as ir
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
    from onnxscript import version_converter

    path = checkpoint.folder / checkpoint.weights[0]
    model = ir.load(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) not in checkpoint.files:
            raise SourceError(
                f"{checkpoint.source}: {path.name} keeps {value.name} in {tensor.location}, which is not in the folder",
                fix="copy it beside the model, or save the model again with its weights in one model.onnx_data",
            )
    version = model.opset_imports.get("", 0)
    if version > OPSET:
        raise SourceError(
            f"{checkpoint.source}: {path.name} is opset {version}; this compiler's graphs are opset {OPSET}",
            fix=f"export it again with opset {OPSET} or lower",
        )
    if version < _REWRITTEN:
        version_converter.convert_version(model, target_version=_REWRITTEN, fallback=True)
    version_converter.convert_version(model, target_version=OPSET)
    faces = {t.name: t.shape for t in spec.inputs}
    for value in model.graph.inputs:
        if value.name in faces:
            value.shape = ir.Shape(faces[value.name])
    inferred = ir.from_proto(SymbolicShapeInference.infer_shapes(ir.to_proto(model), auto_merge=True))
    known = {value.name: value for node in inferred.graph for value in node.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name in known:
                value.type, value.shape = known[value.name].type, known[value.name].shape
    _strip(model)
    model.graph.name = spec.name
    model.producer_name, model.producer_version = "medcompile", ""
    return model
