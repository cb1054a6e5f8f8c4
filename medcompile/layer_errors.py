"""Layer errors: where a variant's typed graph leaves the fp32 one, layer by layer, on real text. `verify --layers`.

Both graphs run on the CPU with ONNX Runtime; the names of values are stable from variant to variant, so every value
that both compute can be compared. Needs onnx_ir and onnxruntime, no torch.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from medcompile import exams, verify
from medcompile.bundle import Bundle
from medcompile.data import Dataset
from medcompile.errors import BackendError, BackendUnavailable, UsageError
from medcompile.run_onnx import errors, run_onnx
from medcompile.spec import Precision, Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

JUMP = 4.0
"""An error jumps where it is this many times the running level: the median over the layers just before it, or what
rounding to the variant's format alone does to one layer, whichever is larger."""
_RUN = 12  # layers that the running level looks back on: about one transformer block
_ROUNDING = {
    Precision.FLOAT32: 1e-4,
    Precision.FLOAT16: 2e-3,
    Precision.BFLOAT16: 2e-2,
    Precision.INT8: 0.1,
    Precision.FLOAT8: 0.15,
    Precision.INT4: 0.15,
    Precision.STORED: 0.15,
}
_MOVING = frozenset({"Cast", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Concat", "Expand", "Slice", "Identity"})


@dataclass(frozen=True)
class LayerError:
    """A node of both graphs. error: of its output, ||variant - fp32|| / ||fp32|| over all batches.

    level: the running level before it; jumped: the error is more than JUMP times that.
    """

    node: str
    op: str
    error: float
    level: float
    jumped: bool


def layer_errors(
    bundle: Bundle, variant: str, graph: str, dataset: Dataset, *, batches: int = 4, batch: int = 4
) -> tuple[LayerError, ...]:
    """The error of every layer that the variant's graph shares with the fp32 one, in graph order.

    Raises UsageError if the bundle lacks one of the two, BackendUnavailable without the build libraries.
    """
    reference = fp32_of(bundle)
    if variant not in bundle.variants or variant == reference.name:
        others = ", ".join(name for name in bundle.variants if name != reference.name) or "none"
        raise UsageError(
            f"{bundle.name} has no variant {variant!r} to hold against {reference.name}", fix=f"choose from: {others}"
        )
    exact, lower = _load(bundle, reference.name, graph), _load(bundle, variant, graph)
    shared = _shared(exact, lower)
    names = tuple(name for name, _ in shared)
    few = replace(dataset, items=dataset.items[: batches * batch])
    fed = list(exams.of(graph, verify.setting(bundle, few)).feeds(batch))
    try:
        squares = _squares(run_onnx(exact, iter(fed), names), run_onnx(lower, iter(fed), names), names)
    except errors() as error:
        raise BackendError(
            f"ONNX Runtime's CPU provider can't run {graph} of {variant}: {str(error).splitlines()[0]}",
            fix="choose a variant whose formats a CPU has: float16, int8, int4",
        ) from error
    given = bundle.variants[variant]
    formats = {p for form in given.forms for p in (form.float_dtype, form.weights, form.activations) if p is not None}
    floor = max(_ROUNDING[p] for p in formats)
    return tuple(_judged(((node, squares[name]) for name, node in shared), floor))


def fp32_of(bundle: Bundle) -> Variant:
    """The bundle's variant in float32 throughout. Raises UsageError if it has none."""
    for variant in bundle.variants.values():
        if not variant.quantized and variant.float_dtype is Precision.FLOAT32:
            return variant
    raise UsageError(
        f"{bundle.name} has no fp32 variant to hold others against", fix="add `fp32: {}` to the recipe's variants"
    )


def _load(bundle: Bundle, variant: str, graph: str) -> ir.Model:
    try:
        from medcompile import onnx_files

        return onnx_files.load(bundle.root / f"graphs/{variant}/{graph}.onnx")
    except ImportError as error:
        raise BackendUnavailable(
            f"layers are compared with onnx_ir, which can't be imported: {error}", fix='pip install "medcompile[build]"'
        ) from error


def _shared(exact: ir.Model, lower: ir.Model) -> list[tuple[str, ir.Node]]:
    """The float values that both graphs compute, not only move, with one operator: name, and the exact graph's node."""
    there = {v.name: node.op_type for node in lower.graph for v in node.outputs}
    return [
        (value.name, node)
        for node in exact.graph
        for value in node.outputs[:1]
        if value.name and there.get(value.name) == node.op_type and value.dtype is not None
        if value.dtype.is_floating_point() and node.op_type not in _MOVING
    ]


def _squares(
    exact: Iterator[dict[str, Array]], lower: Iterator[dict[str, Array]], names: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """By value, the summed squares of its error and of itself. A value that is not finite in both counts as inf."""
    import numpy as np

    sums: dict[str, tuple[float, float]] = {}
    for ours, theirs in zip(exact, lower, strict=True):
        for name in names:
            wanted, given = ours[name].astype(np.float64), theirs[name].astype(np.float64)
            known = np.isfinite(wanted)  # a mask's -inf, say
            difference = float(np.square((given - wanted)[known]).sum())
            error, size = sums.get(name, (0.0, 0.0))
            sums[name] = (
                error + (difference if np.isfinite(difference) else float("inf")),
                size + float(np.square(wanted[known]).sum()),
            )
    return sums


def _judged(measured: Iterable[tuple[ir.Node, tuple[float, float]]], floor: float) -> Iterator[LayerError]:
    recent: deque[float] = deque(maxlen=_RUN)
    for node, (difference, size) in measured:
        error = (difference / size) ** 0.5 if size else 0.0
        level = max(statistics.median(recent) if recent else 0.0, floor)
        yield LayerError(node.name or "", node.op_type, error, level, error > JUMP * level)
        recent.append(error)
