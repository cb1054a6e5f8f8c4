"""What contenders that generate share: the greedy answer of a run, timed token by token."""

from __future__ import annotations

import itertools
import runpy
import sys
import time
from collections.abc import Iterable, Sequence

from medcompile.bench.peer import Answer, Job

TASKS = ("generate",)


def timed(start_ns: int, steps: Iterable[Sequence[int]]) -> Answer:
    """Take the steps of a run, each the next token of every row; they are computed as they are taken."""
    tokens, times = [], []
    for step in steps:
        times.append(time.perf_counter_ns())
        tokens.append(list(step))
    return answer(tokens, start_ns, times)


def answer(tokens: Sequence[Sequence[int]], start_ns: int, times_ns: Sequence[int]) -> Answer:
    """tokens: by step, then by row. times_ns: when each step was done."""
    import numpy as np

    return Answer(
        np.array(tokens, np.int64).T,
        first_ns=times_ns[0] - start_ns,
        steps_ns=tuple(b - a for a, b in itertools.pairwise(times_ns)),
    )


def context(job: Job) -> int:
    """Tokens of the longest row that is asked for, the new ones included."""
    return max(cell.sequence + cell.new for cell in job.cells)


def block_size(hidden: int, intermediate: int, most: int) -> int:
    """The largest block of int4 weights, a power of two up to most, that divides every linear layer's inputs."""
    size = most
    while size > 16 and (hidden % size or intermediate % size):
        size //= 2
    return size


def run_module(module: str, arguments: Sequence[str]) -> None:
    """What `python -m module arguments` does, in this process, so that its memory is counted."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{module} ended with {end.code}") from end
