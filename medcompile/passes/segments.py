"""Segments: a float graph cut in front of each group of linear layers, so that what lies before a group runs once.

Each segment is a small model with its session kept open; a batch's state between two of them is the values that the
rest of the graph reads. What a change inside one segment does to the graph's outputs costs that segment anew, and the
ones behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcompile.passes.calibrate import portion
from medcompile.passes.linear import linear_groups
from medcompile.rewrites.fresh_attention import feeds_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.program import RunOnnx

    Array = np.ndarray[Any, Any]
    State = Mapping[str, Array]


@dataclass(frozen=True)
class Segment:
    """A piece of a graph: a model of its nodes, in which one group of linear layers comes first; or none, in the first.

    model reads the values that a state must hold and gives made; later: what is read behind it, of the whole state.
    """

    model: ir.Model
    made: tuple[str, ...]
    later: frozenset[str]


class Running:
    """A segment's model, or one changed, with its session open: from the state before it to the state behind it."""

    def __init__(self, segment: Segment, run_onnx: RunOnnx, model: ir.Model | None = None) -> None:
        self._segment, self._model = segment, model or segment.model
        self._waiting: deque[State] = deque()
        self._results = run_onnx(self._model, self._fed(), segment.made)

    def __call__(self, state: State) -> State:
        self._waiting.append(feeds_of(self._model, state))
        made = next(self._results)
        return {name: state[name] for name in state.keys() & self._segment.later} | made

    def _fed(self) -> Iterator[State]:
        while True:
            yield self._waiting.popleft()


def cut(model: ir.Model, outputs: Sequence[str]) -> tuple[Segment, ...]:
    """The segments of model that give outputs, in order; the state behind the last one holds these alone.

    A first segment with no group holds what stands before all linear layers. Paged attention is written out for fresh
    sequences, as in calibration.
    """
    whole = portion(model, tuple(outputs))
    groups = linear_groups(whole)
    for group in groups:  # they read one tensor and stored weights, so they can stand together
        for before, node in zip(group.nodes, group.nodes[1:], strict=False):
            whole.graph.remove(node)
            whole.graph.insert_after(before, node)
    starts = {group.nodes[0] for group in groups}
    pieces: list[list[ir.Node]] = [[]]
    for node in whole.graph:
        if node in starts:
            pieces.append([])
        pieces[-1].append(node)
    return tuple(_segments(whole, [nodes for nodes in pieces if nodes]))


def _segments(whole: ir.Model, pieces: Sequence[list[ir.Node]]) -> Iterator[Segment]:
    import onnx_ir as ir

    read: list[set[ir.Value]] = [_read(nodes) for nodes in pieces]
    ends = set(whole.graph.outputs)
    for index, nodes in enumerate(pieces):
        later = ends.union(*read[index + 1 :])
        made = [value for node in nodes for value in node.outputs if value in later]
        given = sorted(read[index], key=lambda value: value.name or "")
        for value in (*made, *given):
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        model = ir.Model(ir.convenience.extract(whole.graph, given, made), ir_version=whole.ir_version)
        names = tuple(value.name or "" for value in made)
        yield Segment(model, names, frozenset(value.name or "" for value in later))


def _read(nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """What nodes read that is neither stored nor made by them."""
    made = {value for node in nodes for value in node.outputs}
    return {v for node in nodes for v in node.inputs if v is not None and v.const_value is None} - made
