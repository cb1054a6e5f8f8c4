"""Calibrate: run the calibration data through the float graph and keep statistics of what enters its linear layers.

Activations are streamed: a few tensors are outputs of a run at a time, each batch is folded into the tensor's
Observer and dropped. Nothing of the data stays but the statistics. How they become scales is quantize's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcompile.errors import CalibrationError
from medcompile.passes.linear import linear_groups
from medcompile.program import Context, Graph, Program
from medcompile.rewrites import fresh_attention
from medcompile.rewrites.fresh_attention import feeds_of
from medcompile.spec import Stage

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.program import Feeds
    from medcompile.statistics import Statistics

    Array = np.ndarray[Any, Any]

# Activations of one batch that are held at once; a group has at least one tensor.
_HELD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Calibrate:
    """Program.statistics[graph name][tensor name]: Statistics of every tensor that a linear layer reads.

    graphs: only these are observed; empty is all.
    minimum: fewest calibration items (rows of the batches' first axis) that are taken for enough.
    Padding is left out: where a feed holds `attention_mask` [batch, sequence], a tensor that has those two axes in
    front (or both in one) is observed at the mask's ones only.
    Raises CalibrationError on too few items, a NaN or Inf (naming the tensor), or no data at all.
    """

    graphs: tuple[str, ...] = ()
    minimum: int = 32
    name: str = "calibrate"
    version: int = 3
    needs: Stage = Stage.SIMPLIFIED
    gives: Stage = Stage.CALIBRATED

    def __call__(self, program: Program, ctx: Context) -> Program:
        graphs = {name: graph for name, graph in program.graphs.items() if not self.graphs or name in self.graphs}
        statistics = {name: self._observe(graph, ctx) for name, graph in graphs.items()}
        return dataclasses.replace(program, statistics=statistics, stage=self.gives)

    def _observe(self, graph: Graph, ctx: Context) -> Mapping[str, Statistics]:
        needs_data(graph.name, ctx)
        items = tokens = 0
        for feeds in ctx.batches(graph.name):  # type: ignore[misc]
            shape = next(iter(feeds.values())).shape
            # A ragged batch holds the tokens of its sequences end to end.
            items += len(feeds["query_starts"]) - 1 if "query_starts" in feeds else shape[0]
            tokens = max(tokens, shape[0] * (shape[1] if len(shape) > 1 else 1))
        if items < self.minimum:
            raise CalibrationError(
                f"{graph.name}: {items} calibration items, and {self.minimum} are the least",
                fix="add items to the calibration data, or raise calibration.samples",
            )
        widths = {group.tensor: group.channels for group in linear_groups(graph.model)}
        statistics: dict[str, Statistics] = {}
        for names in _grouped(widths, tokens):
            ctx.progress.step(f"{graph.name}: {names[0]}", len(statistics), len(widths))
            statistics |= _stream(graph, names, ctx)
        return statistics


def needs_data(graph: str, ctx: Context) -> None:
    """Raises CalibrationError if there is no calibration data."""
    if ctx.batches is None or ctx.run_onnx is None:
        raise CalibrationError(
            f"{graph}: this variant needs calibration data",
            fix="name a data manifest under calibration.data in the recipe, or choose method: rtn and dynamic: true",
        )


def _grouped(widths: Mapping[str, int], tokens: int) -> Iterator[tuple[str, ...]]:
    """Tensor names in graph order, cut where a batch of float32 activations would pass _HELD_BYTES."""
    group: list[str] = []
    held = 0
    for name, channels in widths.items():
        size = channels * tokens * 4
        if group and held + size > _HELD_BYTES:
            yield tuple(group)
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield tuple(group)


def _stream(graph: Graph, names: tuple[str, ...], ctx: Context) -> dict[str, Statistics]:
    from medcompile.statistics import Observer

    assert ctx.batches is not None and ctx.run_onnx is not None
    masks: list[Array | None] = []

    part = portion(graph.model, names)

    def feeding() -> Iterator[Feeds]:
        for feeds in ctx.batches(graph.name):  # type: ignore[misc]
            masks.append(feeds.get("attention_mask"))
            yield feeds_of(part, feeds)

    observers = {name: Observer() for name in names}
    for outputs in ctx.run_onnx(part, feeding(), names):
        mask = masks.pop(0)
        for name in names:
            try:
                # Taken out, or a batch would stay in memory while the next one is computed.
                observers[name].add(real_rows(outputs.pop(name), mask))
            except ValueError as error:
                raise CalibrationError(
                    f"{graph.name}: activation {name} holds {error} on the calibration data",
                    fix="check the checkpoint in fp32 on this data; a model that overflows here can't be quantized",
                ) from error
    return {name: observer.statistics() for name, observer in observers.items()}


def portion(model: ir.Model, outputs: tuple[str, ...], given: tuple[str, ...] = ()) -> ir.Model:
    """A clone that computes the values named outputs from model's inputs and the values named given, and nothing else.

    Paged attention is written out for fresh sequences in it, so that any ONNX runtime runs it.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    clone = model.clone()
    values = {value.name: value for node in clone.graph for value in node.outputs}
    clone.graph.outputs[:] = [values[name] for name in outputs]
    for value in clone.graph.outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    for name in given:
        value = values[name]
        known = ir.Value(name=name, type=value.type or ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        value.replace_all_uses_with(known)
        value.name = f"{name}/made"
        clone.graph.inputs.append(known)
    RemoveUnusedNodesPass()(clone)
    fresh_attention.rewrite(clone)
    clone.graph.inputs[:] = [value for value in clone.graph.inputs if value.uses()]
    return clone


def real_rows(activation: Array, mask: Array | None) -> Array:
    """activation [..., channels] as rows [n, channels], padding left out where mask [batch, sequence] applies."""
    if mask is not None and activation.shape[:2] == mask.shape and activation.ndim == 3:
        rows: Array = activation[mask.astype(bool)]
        return rows
    rows = activation.reshape(-1, activation.shape[-1])
    return rows[mask.ravel().astype(bool)] if mask is not None and len(rows) == mask.size else rows
