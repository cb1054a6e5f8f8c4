"""Sensitivity: which linear layers a format hurts most, so that a budget is spent where it buys the most.

One group of layers at a time is quantized, everything else stays in float, and the graph's outputs are compared on
calibration data. What is done with the ranking is the pipeline's and the search's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from medcompile.errors import CalibrationError
from medcompile.passes.calibrate import real_rows
from medcompile.passes.linear import linear_groups
from medcompile.passes.quantize import Quantize, check, observer_of, quantize_group
from medcompile.passes.segments import Running, Segment, cut
from medcompile.passes.stored import stored_matmuls
from medcompile.program import Context, Graph, Program
from medcompile.spec import Precision, Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.passes.linear import LinearGroup
    from medcompile.passes.segments import State
    from medcompile.program import Feeds

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sensitivity:
    """Linear layers that read one tensor, by node name, and what quantizing them alone does to the graph's outputs:
    the norm of the change over the norm of the outputs, on real tokens."""

    nodes: tuple[str, ...]
    error: float


@dataclass(frozen=True)
class GroupErrors:
    """As Sensitivity, for several formats: by name of the format, its error. One that leaves the group in float is not
    there, and nodes are those that any of them quantizes."""

    nodes: tuple[str, ...]
    errors: Mapping[str, float]


def sensitivity(
    program: Program, ctx: Context, quantize: Quantize, batches: int = 4
) -> Mapping[str, tuple[Sensitivity, ...]]:
    """By graph name, the groups that ctx.variant would quantize, most harmful first. Names can go into variant.keep.

    As sensitivities() of that one variant.
    """
    variant = ctx.variant
    if variant is None:
        raise CalibrationError("sensitivity needs a variant", fix="name one of the recipe's variants")
    found = sensitivities(program, ctx, quantize, {"": variant}, batches)
    rows = {graph: [Sensitivity(group.nodes, group.errors[""]) for group in groups] for graph, groups in found.items()}
    return {graph: tuple(sorted(ranked, key=lambda s: -s.error)) for graph, ranked in rows.items()}


def sensitivities(
    program: Program, ctx: Context, quantize: Quantize, formats: Mapping[str, Variant], batches: int = 4
) -> Mapping[str, tuple[GroupErrors, ...]]:
    """By graph name, the groups of linear layers that any of formats would quantize, in graph order.

    formats: variants, by any names; of each its linear layers count alone, with its keep, layers and graphs.
    program: what quantize takes (with statistics where a format needs them). batches: calibration batches to run.
    The reference is run twice; then each group and format costs a run of what lies behind the group. Methods that must
    see whole activations (awq, gptq) see those batches, in float. Raises CalibrationError without data, QuantizeError
    as quantize does.
    """
    if ctx.batches is None or ctx.run_onnx is None:
        raise CalibrationError(
            "sensitivity needs calibration data", fix="name a data manifest under calibration.data in the recipe"
        )
    for variant in formats.values():
        check(variant, program)
    made = {}
    for name, graph in program.graphs.items():
        here = {key: variant for key, variant in formats.items() if variant.on(name).quantized}
        if here:
            made[name] = tuple(_rows(graph, program, ctx, here, quantize, batches))
    return made


def _rows(
    graph: Graph, program: Program, ctx: Context, formats: Mapping[str, Variant], quantize: Quantize, batches: int
) -> Iterator[GroupErrors]:
    assert ctx.batches is not None and ctx.run_onnx is not None
    feeds: list[Feeds] = list(islice(ctx.batches(graph.name), batches))
    masks = [feed.get("attention_mask") for feed in feeds]
    names = tuple(value.name or "" for value in graph.model.graph.outputs)
    segments = cut(graph.model, names)
    runs = [Running(segment, ctx.run_onnx) for segment in segments]
    exact = [_onward(runs, feed) for feed in feeds]
    scale = sum(_square(exact[b][name], masks[b]) for b in range(len(feeds)) for name in names)
    states: list[State] = list(feeds)
    for index, segment in enumerate(segments):
        groups = linear_groups(segment.model)
        errors: dict[str, float] = {}
        chosen: set[str] = set()
        for key, variant in formats.items() if groups else ():
            ctx.progress.step(f"{graph.name}: {groups[0].nodes[0].name}", index, len(segments))
            nodes = {n.name or "" for n in groups[0].nodes if variant.for_node(n.name or "").weights is not None}
            if not nodes:
                continue
            chosen |= nodes
            stats = _statistics(groups[0], variant, program, graph.name, states, masks)
            model = _quantized(segment, variant, stats, program, graph.name, quantize)
            changed = [Running(segment, ctx.run_onnx, model), *runs[index + 1 :]]
            moved = 0.0
            for state, wanted, mask in zip(states, exact, masks, strict=True):
                found = _onward(changed, state)
                moved += sum(_square(found[name] - wanted[name], mask) for name in names)
            errors[key] = (moved / max(scale, 1e-60)) ** 0.5
        if errors:
            yield GroupErrors(tuple(n for node in groups[0].nodes if (n := node.name or "") in chosen), errors)
        states = [runs[index](state) for state in states]


def _onward(runs: Sequence[Running], state: State) -> State:
    for run in runs:
        state = run(state)
    return state


def _statistics(
    group: LinearGroup,
    variant: Variant,
    program: Program,
    graph: str,
    states: Sequence[State],
    masks: Sequence[Array | None],
) -> Any:
    """Of the group's input: from calibration, or from the states where a format must see it by itself."""
    from medcompile.statistics import Observer

    quantizer = observer_of(group, variant)
    if quantizer is None:
        return program.statistics.get(graph, {}).get(group.tensor)
    observer = Observer()
    for state, mask in zip(states, masks, strict=True):
        quantizer.observe(observer, real_rows(state[group.tensor], mask))
    return observer.statistics()


def _quantized(
    segment: Segment, variant: Variant, stats: Any, program: Program, graph: str, quantize: Quantize
) -> ir.Model:
    """A copy of the segment's model with its group as variant says."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = segment.model.clone()
    (group,) = linear_groups(model)
    if variant.weights is Precision.STORED:
        nodes = tuple(n for n in group.nodes if variant.for_node(n.name or "").weights is not None)
        stored_matmuls(model, [dataclasses.replace(group, nodes=nodes)], program.stored.get(graph, {}), variant)
    else:
        quantize_group(model, group, variant, stats, quantize)
    RemoveUnusedNodesPass()(model)
    return model


def _square(values: Array, mask: Array | None) -> float:
    """The sum of squares over real tokens."""
    import numpy as np

    return float(np.square(real_rows(values, mask), dtype=np.float64).sum())
