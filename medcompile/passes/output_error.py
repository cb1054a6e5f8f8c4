"""What lowering a whole program does to its outputs, on calibration data: the cheap look before any judgement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from medcompile.passes.calibrate import portion, real_rows
from medcompile.program import Program
from medcompile.rewrites.fresh_attention import feeds_of

if TYPE_CHECKING:
    from medcompile.program import Feeds, RunOnnx


def output_error(
    exact: Program, lower: Program, batches: Callable[[str], Iterator[Feeds]], run_onnx: RunOnnx, most: int
) -> float:
    """The norm of the change of all outputs over their norm, on real tokens; over graphs, the root of summed squares.

    most: calibration batches to run.
    """
    import numpy as np

    total = 0.0
    for name, graph in exact.graphs.items():
        outputs = tuple(value.name or "" for value in graph.model.graph.outputs)
        feeds = list(islice(batches(name), most))
        moved = scale = 0.0
        runs = []
        for program in (exact, lower):
            part = portion(program.graphs[name].model, outputs)
            runs.append(run_onnx(part, (feeds_of(part, feed) for feed in feeds), outputs))
        for feed, wanted, given in zip(feeds, *runs, strict=True):
            for output in outputs:
                rows, others = (real_rows(found[output], feed.get("attention_mask")) for found in (wanted, given))
                moved += float(np.square(others - rows, dtype=np.float64).sum())
                scale += float(np.square(rows, dtype=np.float64).sum())
        total += moved / max(scale, 1e-60)
    return float(total**0.5)
