"""Sensitivity: which linear layers a variant hurts most, so that a budget is spent where it buys the most.

One group of layers at a time is quantized, everything else stays in float, and the graph's outputs are compared on
calibration data. What is done with the ranking is the pipeline's business.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from medcompile.errors import CalibrationError
from medcompile.passes.calibrate import portion, real_rows
from medcompile.passes.linear import linear_groups
from medcompile.passes.quantize import Quantize, kept
from medcompile.program import Context, Graph, Program
from medcompile.rewrites.fresh_attention import feeds_of
from medcompile.spec import Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.program import Feeds

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sensitivity:
    """Linear layers that read one tensor, by node name, and what quantizing them alone does to the graph's outputs:
    the norm of the change over the norm of the outputs, on real tokens."""

    nodes: tuple[str, ...]
    error: float


def sensitivity(
    program: Program, ctx: Context, quantize: Quantize, batches: int = 4
) -> Mapping[str, tuple[Sensitivity, ...]]:
    """By graph name, the groups that ctx.variant would quantize, most harmful first. Names can go into variant.keep.

    program: what quantize takes (with statistics where the variant needs them). batches: calibration batches to run;
    the cost is one run over them for every group. Raises CalibrationError without data, QuantizeError as quantize does.
    """
    if ctx.variant is None or ctx.batches is None or ctx.run_onnx is None:
        raise CalibrationError(
            "sensitivity needs a variant and calibration data",
            fix="name a data manifest under calibration.data in the recipe",
        )
    graphs = {name: graph for name, graph in program.graphs.items() if ctx.variant.on(name).quantized}
    return {name: _rank(graph, program, ctx, ctx.variant, quantize, batches) for name, graph in graphs.items()}


def _rank(
    graph: Graph, program: Program, ctx: Context, variant: Variant, quantize: Quantize, batches: int
) -> tuple[Sensitivity, ...]:
    import numpy as np

    names = [tuple(n.name or "" for n in g.nodes) for g in linear_groups(graph.model)]
    every = [name for group in names for name in group]
    reference = list(_outputs(graph.model, graph, ctx, batches))
    scale = np.sqrt(sum(float(np.square(rows, dtype=np.float64).sum()) for rows in reference))
    alone = dataclasses.replace(program, graphs={graph.name: graph})
    ranked = []
    for done, group in enumerate(names):
        chosen = tuple(name for name in group if not kept(name, variant.keep))
        if not chosen:
            continue
        ctx.progress.step(f"{graph.name}: {chosen[0]}", done, len(names))
        others = tuple(glob.escape(name) for name in every if name not in chosen)
        only = dataclasses.replace(ctx, variant=dataclasses.replace(variant, keep=others))
        model = quantize(alone, only).graphs[graph.name].model
        moved = sum(
            float(np.square(rows - expected, dtype=np.float64).sum())
            for rows, expected in zip(_outputs(model, graph, ctx, batches), reference, strict=True)
        )
        ranked.append(Sensitivity(chosen, float(np.sqrt(moved) / max(scale, 1e-30))))
    return tuple(sorted(ranked, key=lambda s: -s.error))


def _outputs(model: ir.Model, graph: Graph, ctx: Context, batches: int) -> Iterator[Array]:
    """Every output of every batch as rows [n, channels], padding left out."""
    assert ctx.batches is not None and ctx.run_onnx is not None
    feeds: list[Feeds] = list(islice(ctx.batches(graph.name), batches))
    names = tuple(value.name or "" for value in model.graph.outputs)
    part = portion(model, names)
    results = ctx.run_onnx(part, (feeds_of(part, feed) for feed in feeds), names)
    for feed, outputs in zip(feeds, results, strict=True):
        for name in names:
            yield real_rows(outputs[name], feed.get("attention_mask"))
