"""What contenders share that loads no library: a Runner around a function, tuned batch sizes, what the CPU can do."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medcompile.bench.peer import Answer, Array, Batch, Cell, Note

BATCH_SIZES = (1, 8, 32)
"""What a user would try of a batch_size argument."""

_SAMPLE = 64  # items that batch sizes are tried on

Texts = Callable[[Sequence[str], int], Answer]
"""items, batch size -> the answer to all of them."""


@dataclass
class FunctionRunner:
    """A Runner that calls one function. notes may grow while it runs."""

    call: Callable[[Batch], Answer] | None
    notes: dict[str, Note] = field(default_factory=dict)

    def run(self, batch: Batch) -> Answer:
        assert self.call is not None, "run() after close()"
        return self.call(batch)

    def close(self) -> None:
        self.call = None


def array_runner(call: Callable[[Mapping[str, Array]], Array], notes: Mapping[str, Note]) -> FunctionRunner:
    """A Runner of what takes a graph's inputs and gives its one output."""
    return FunctionRunner(lambda batch: Answer(call(batch.feeds)), dict(notes))


def tuned_runner(call: Texts, notes: Mapping[str, Note]) -> FunctionRunner:
    """A Runner of what has a batch size to choose.

    The first run of a cell, which warms up, tries BATCH_SIZES on a sample of its items; later ones keep the fastest.
    """
    chosen: dict[Cell, int] = {}
    runner = FunctionRunner(None, dict(notes))

    def run(batch: Batch) -> Answer:
        if batch.cell not in chosen:
            chosen[batch.cell] = _fastest(call, batch.items[:_SAMPLE])
            runner.notes[f"batch size, {batch.cell.name}"] = chosen[batch.cell]
        return call(batch.items, chosen[batch.cell])

    runner.call = run
    return runner


def _fastest(call: Texts, items: Sequence[str]) -> int:
    sizes = [size for size in BATCH_SIZES if size <= len(items)] or [1]
    if len(sizes) == 1:
        return sizes[0]
    call(items[: sizes[-1]], sizes[-1])  # the first call of all allocates
    taken = {}
    for size in sizes:
        start = time.perf_counter_ns()
        call(items, size)
        taken[size] = time.perf_counter_ns() - start
    return min(taken, key=lambda size: taken[size])


def normalized(rows: Array) -> Array:
    """Rows of length 1."""
    import numpy as np

    length: Any = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, 1e-12)  # type: ignore[no-any-return]


def onnxruntime_instructions() -> str:
    """This CPU by the names that Optimum and sentence-transformers have for their int8 settings."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return "avx2"
    return next((name for name in ("avx512_vnni", "avx512f") if name in flags), "avx2").replace("avx512f", "avx512")
