"""Quantize: put the integers into the graph, as standard ONNX operators, for the variant in hand.

Static W8A8 is QuantizeLinear/DequantizeLinear around the activation and DequantizeLinear on the weight; weight-only is
the latter alone; dynamic takes its activation scales per token at run time (passes/dynamic_int8.py). The numbers come
from a quantizer and from the statistics; this is the only room that knows both them and the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcompile.errors import QuantizeError
from medcompile.passes.bias import add_to_output, mean_lost
from medcompile.passes.dynamic_int8 import dynamic_matmuls
from medcompile.passes.edits import constant, insert
from medcompile.passes.embeddings import quantize_embeddings
from medcompile.passes.float8 import float8_matmuls
from medcompile.passes.fold import fold
from medcompile.passes.layerwise import Carried
from medcompile.passes.linear import LinearGroup, linear_groups
from medcompile.passes.stored import stored_matmuls
from medcompile.program import Context, Graph, Program
from medcompile.spec import Precision, Stage, Variant, kept

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.quantizers import Quantizer, Solution
    from medcompile.statistics import Statistics

    Array = np.ndarray[Any, Any]

_BITS = {Precision.INT8: 8, Precision.INT4: 4}


@dataclass(frozen=True)
class Quantize:
    """Quantizes every linear layer of every graph as ctx.variant says, but those that variant.keep names.

    method: how an activation's clipping range is found where no quantizer rescales its channels, unless
    variant.clipping says it; rescaled ones take all that was seen (clipping them gains nothing, and outliers are what
    the rescaling is for).
    percentile: for method percentile, the share of values kept, in %.
    Where block_size does not divide a layer's inputs, it has smaller blocks: half of that, a quarter, 16 at least.
    A keep pattern is a glob over node names; `encoder.layer.3.output.dense` means the node of that module.
    Raises QuantizeError on a variant that makes no sense, missing statistics, or a damaged weight (naming the node).
    """

    method: str = "mse"
    percentile: float = 99.99
    name: str = "quantize"
    version: int = 3
    needs: Stage = Stage.SIMPLIFIED
    gives: Stage = Stage.QUANTIZED

    def __call__(self, program: Program, ctx: Context) -> Program:
        variant = ctx.variant
        if variant is None or not variant.quantized:
            return program.with_graphs(program.graphs, self.gives)
        check(variant, program)
        graphs = {}
        for name, graph in program.graphs.items():
            if not variant.on(name).quantized:
                graphs[name] = graph
                continue
            model = graph.model.clone()
            if variant.weights is Precision.STORED:
                stored_matmuls(model, _chosen(model, variant), program.stored.get(name, {}), variant)
            else:
                _quantize_graph(name, model, variant, program.statistics.get(name, {}), self, ctx)
            if variant.embeddings is not None:
                quantize_embeddings(model)
            _drop_unused(model)
            graphs[name] = Graph(graph.spec, model)
        return program.with_graphs(graphs, self.gives)


def check(variant: Variant, program: Program) -> None:
    """Raises QuantizeError on a variant that makes no sense, or has a pattern that names no linear layer of program:
    that is a typing error, and would quantize what must not be, or leave what should."""
    from medcompile.statistics import METHODS

    if variant.clipping not in ("", *METHODS):
        raise QuantizeError(
            f"variant {variant.name}: no clipping {variant.clipping!r}", fix=f"use one of {', '.join(METHODS)}"
        )
    for form in variant.forms:
        if form.weights is not None or form.activations is not None:
            _check_form(form, mixed=bool(variant.layers))
    lowered = [graph for name, graph in program.graphs.items() if variant.on(name).quantized]
    names = [n.name or "" for g in lowered for group in linear_groups(g.model) for n in group.nodes]
    for kind, patterns in (("keep", variant.keep), ("layers", tuple(rule.pattern for rule in variant.layers))):
        for pattern in patterns:
            if not any(kept(name, (pattern,)) for name in names):
                raise QuantizeError(
                    f"variant {variant.name}: {kind} pattern {pattern!r} matches no linear layer",
                    fix=f"use node names such as {', '.join(names[:3])}, or globs over them",
                )


def _check_form(variant: Variant, *, mixed: bool) -> None:
    """variant: one format."""
    from medcompile import quantizers

    if variant.weights is Precision.STORED:
        if mixed or variant.bias_correction:
            raise QuantizeError(
                f"variant {variant.name}: stored weights have the formats that the checkpoint gave them",
                fix="leave out layers and bias_correction, or write weights: int8 or int4",
            )
        return
    if Precision.FLOAT8 in (variant.weights, variant.activations):
        if (variant.weights, variant.activations, variant.method) != (Precision.FLOAT8, Precision.FLOAT8, "rtn"):
            raise QuantizeError(
                f"variant {variant.name}: float8 is for weights and activations both, with method rtn",
                fix="write weights: float8, activations: float8 and no method",
            )
        if variant.dynamic or variant.block_size or not variant.symmetric or variant.bias_correction:
            raise QuantizeError(
                f"variant {variant.name}: float8 has one stored scale per tensor, no zero point and no bias correction",
                fix="leave out dynamic, block_size, symmetric and bias_correction",
            )
        return
    if variant.weights not in _BITS or variant.activations not in (None, Precision.INT8):
        raise QuantizeError(
            f"variant {variant.name}: {variant.weights} weights don't go with {variant.activations} activations",
            fix="use weights: int8 with activations: int8 or none, or weights: int4 without activations",
        )
    if variant.activations is not None and (variant.weights != Precision.INT8 or variant.block_size):
        raise QuantizeError(
            f"variant {variant.name}: int8 activations need int8 weights with one scale per output channel",
            fix="leave out block_size, or leave out activations for weight-only quantization",
        )
    if variant.clipping and variant.method == "smoothquant" and not variant.dynamic:
        raise QuantizeError(
            f"variant {variant.name}: clipping {variant.clipping} has no say where smoothquant rescales the channels",
            fix="use method: rtn, or leave out clipping: rescaled activations take all that was seen",
        )
    if variant.activations is not None and quantizers.get(variant.method).by_layer:
        raise QuantizeError(
            f"variant {variant.name}: {variant.method} is for quantized weights under activations that stay in float",
            fix="leave out activations, or use method: smoothquant",
        )


def _chosen(model: ir.Model, variant: Variant) -> list[LinearGroup]:
    """Every group of linear layers, less the nodes that stay in float."""
    groups = []
    for group in linear_groups(model):
        nodes = tuple(n for n in group.nodes if not kept(n.name or "", variant.keep))
        groups.append(LinearGroup(group.tensor, group.channels, nodes))
    return groups


def _quantize_graph(
    name: str, model: ir.Model, variant: Variant, statistics: Mapping[str, Statistics], options: Quantize, ctx: Context
) -> None:
    from medcompile import quantizers

    by_layer = any(form.weights is not None and quantizers.get(form.method).by_layer for form in variant.forms)
    with ExitStack() as stack:
        carried = stack.enter_context(Carried(model, name, ctx)) if by_layer else None
        groups = linear_groups(model)
        for done, group in enumerate(groups):
            ctx.progress.step(f"{name}: {group.nodes[0].name}", done, len(groups))
            stats = statistics.get(group.tensor)
            observing = observer_of(group, variant)
            if carried and observing is not None:
                stats = carried.statistics(group, observing)
            factor = quantize_group(model, group, variant, stats, options)
            if carried and factor is not None:
                carried.rescale(group.tensor, factor)


def observer_of(group: LinearGroup, variant: Variant) -> Quantizer | None:
    """The quantizer that must see the group's input itself, by layer; None where none of its nodes' formats asks."""
    from medcompile import quantizers

    found = (quantizers.get(form.method) for form, _ in _parts(group, variant))
    return next((quantizer for quantizer in found if quantizer.by_layer), None)


def quantize_group(
    model: ir.Model, group: LinearGroup, variant: Variant, stats: Statistics | None, options: Quantize
) -> Array | None:
    """Quantize the nodes of one group as variant says of each; those of one format together. All may stay in float.

    stats: of the group's input. Returns what the channels of that input have been multiplied by where it is made, if
    they have. That is done only where all readers of the input have one format: else each format rescales its own copy.
    Raises QuantizeError on missing statistics or a damaged weight, naming the node.
    """
    factor = None
    for index, (form, nodes) in enumerate(_parts(group, variant)):
        base = group.tensor if index == 0 else f"{group.tensor}/{index}"  # what is put in is named after it
        made = _quantize_part(model, group.tensor, LinearGroup(base, group.channels, nodes), form, stats, options)
        factor = made if factor is None else factor
    return factor


def _parts(group: LinearGroup, variant: Variant) -> list[tuple[Variant, tuple[ir.Node, ...]]]:
    """The group's nodes by format, those that stay in float left out."""
    found: dict[tuple[object, ...], tuple[Variant, list[ir.Node]]] = {}
    for node in group.nodes:
        form = variant.for_node(node.name or "")
        if form.weights is not None:
            key = (form.weights, form.activations, form.dynamic, form.block_size)
            found.setdefault(key, (form, []))[1].append(node)
    return [(form, tuple(nodes)) for form, nodes in found.values()]


def _quantize_part(
    model: ir.Model, tensor: str, group: LinearGroup, variant: Variant, stats: Statistics | None, options: Quantize
) -> Array | None:
    """As quantize_group, of nodes that have one format, variant's. tensor: the name of their input."""
    import numpy as np

    from medcompile import quantizers

    if stats is None and variant.needs_statistics:
        raise QuantizeError(
            f"{group.nodes[0].name}: no statistics of its input {tensor}",
            fix="run calibrate on the same graphs first (the recipe's calibration.data)",
        )
    if variant.weights == Precision.FLOAT8:
        assert stats is not None
        float8_matmuls(model, group, stats)
        return None
    variant = dataclasses.replace(variant, block_size=_fitting_block(variant.block_size, group.channels))
    form = quantizers.WeightFormat(
        _BITS[Precision(variant.weights or "")], variant.block_size, variant.smoothing, variant.symmetric
    )
    weights = [_weight(node) for node in group.nodes]
    try:
        solution = quantizers.get(variant.method).solve(np.concatenate(weights, axis=1), stats, form)
    except QuantizeError as error:
        raise QuantizeError(f"{group.nodes[0].name}: {error.message}", fix=error.fix) from error
    widths = np.cumsum([w.shape[1] for w in weights])[:-1]
    values = np.split(solution.values, widths, axis=1)
    scales = np.split(solution.scales, widths, axis=-1)
    if variant.bias_correction:
        assert stats is not None
        for node, weight, value, scale in zip(group.nodes, weights, values, scales, strict=True):
            lost = mean_lost(weight, dataclasses.replace(solution, values=value, scales=scale), stats)
            add_to_output(model, node, lost)
    activation, factor = _equalized(model, group, solution)
    if variant.dynamic:
        dynamic_matmuls(model, group.nodes, activation, values, scales)
        return factor
    if variant.activations is not None:
        assert stats is not None
        ends = _range(stats, solution, variant, options)
        activation = _qdq(model, group, activation, ends, variant)
    for node, value, scale in zip(group.nodes, values, scales, strict=True):
        node.replace_input_with(0, activation)
        node.replace_input_with(1, _dequantized_weight(model, node, value, scale, variant))
    return factor


def _fitting_block(block_size: int | None, channels: int) -> int | None:
    """block_size halved until it divides the layer's inputs, but to 16 at least: smaller ones no backend takes."""
    while block_size and channels % block_size and block_size % 2 == 0 and block_size > 16:
        block_size //= 2
    return block_size


def _weight(node: ir.Node) -> Array:
    from medcompile.passes.derived import read

    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    return read(weight.const_value)


def _equalized(model: ir.Model, group: LinearGroup, solution: Solution) -> tuple[ir.Value, Array | None]:
    """The group's input, times the inverse of the solution's input scale; and the inverse, if what makes the input
    took it. Else one Mul serves all consumers: where a residual path reads the input too, say."""
    activation = group.nodes[0].inputs[0]
    assert activation is not None
    if solution.input_scale is None:
        return activation, None
    inverse = 1 / solution.input_scale
    if fold(model, activation, group.nodes, inverse):
        return activation, inverse
    factor = constant(model, f"{group.tensor}/inverse_scale", inverse)
    return insert(model, group.nodes[0], "Mul", [activation, factor], f"{group.tensor}/equalize"), None


def _range(stats: Statistics, solution: Solution, variant: Variant, options: Quantize) -> tuple[float, float]:
    from medcompile.statistics import clipping_range

    symmetric = variant.symmetric
    if solution.input_scale is None:
        return clipping_range(stats, variant.clipping or options.method, symmetric, options.percentile)
    low = min(float((stats.channel_min / solution.input_scale).min()), 0.0)
    high = max(float((stats.channel_max / solution.input_scale).max()), 0.0)
    if low == high:
        return -1.0, 1.0
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def _qdq(
    model: ir.Model, group: LinearGroup, activation: ir.Value, ends: tuple[float, float], variant: Variant
) -> ir.Value:
    import numpy as np

    low, high = ends
    if variant.symmetric:
        step, zero = np.float32(high / 127), np.array(0, np.int8)
    else:
        step = np.float32((high - low) / 255)
        zero = np.array(np.clip(round(-low / float(step)), 0, 255), np.uint8)
    scale = constant(model, f"{group.tensor}/scale", np.array(step))
    zero_point = constant(model, f"{group.tensor}/zero_point", zero)
    first = group.nodes[0]
    quantized = insert(model, first, "QuantizeLinear", [activation, scale, zero_point], f"{group.tensor}/quantize")
    return insert(model, first, "DequantizeLinear", [quantized, scale, zero_point], f"{group.tensor}/dequantize")


def _dequantized_weight(model: ir.Model, node: ir.Node, values: Array, scales: Array, variant: Variant) -> ir.Value:
    import ml_dtypes
    import numpy as np

    base = node.name or ""
    integer = np.dtype(np.int8 if variant.weights == Precision.INT8 else ml_dtypes.int4)
    inputs = [
        constant(model, f"{base}/weight", values.astype(integer, copy=False)),
        constant(model, f"{base}/weight_scale", scales),
    ]
    if not variant.block_size:  # of blocks TensorRT takes none, and OpenVINO would subtract even zeros
        inputs.append(constant(model, f"{base}/weight_zero_point", np.zeros(scales.shape, integer)))
    attributes = {"axis": 0, "block_size": variant.block_size} if variant.block_size else {"axis": 1}
    return insert(model, node, "DequantizeLinear", inputs, f"{base}/weight_dequantize", attributes=attributes)


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
