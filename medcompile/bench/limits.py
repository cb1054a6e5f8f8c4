"""What this machine can do at most, measured: bytes read from memory, and multiplications by precision.

    python -P limits.py THREADS CPU,CPU,...

A process of its own, so that its threads and memory disturb nobody. Each peak is the best of many short tries, some of
which no other process cuts into, by the best of the libraries that are installed; what none of them can do is left out.
Prints one line of JSON (results.Limits).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_TRIES_S = 1.5
_READ_BYTES = 256 << 20
_WIDTH, _ROWS, _DEPTH = 1024, 256, 4

Peak = tuple[str, float, str]
"""precision, 10^9 operations a second (a multiply and an add are two), what measured it."""


def main() -> None:
    threads, cpus = int(sys.argv[1]), [int(c) for c in sys.argv[2].split(",")]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    gops: dict[str, float] = {}
    by: dict[str, str] = {}
    for measure in (_by_numpy, _by_torch, _by_openvino):
        with contextlib.suppress(ImportError, RuntimeError, AttributeError):  # a library that lacks a format here
            for precision, speed, name in measure(threads):
                if speed > gops.get(precision, 0.0):
                    gops[precision], by[precision] = speed, name
    told = {"memory_gbs": read_gbs(threads), "cache_mb": cache_mb(), "gops": gops, "by": by}
    replies.write(json.dumps(told) + "\n")


def read_gbs(threads: int) -> float:
    """10^9 bytes a second, of so many threads that each read an array larger than any cache. BLAS must have one thread,
    as it has by default here: main() is started so."""
    arrays = [np.ones(_READ_BYTES // threads // 4, np.float32) for _ in range(threads)]

    def all_read() -> None:
        workers = [threading.Thread(target=np.dot, args=(a, a)) for a in arrays]
        for one in workers:
            one.start()
        for one in workers:
            one.join()

    return sum(a.nbytes for a in arrays) / _best_s(all_read, threads) / 1e9


def cache_mb() -> float:
    """10^6 bytes of the largest cache; 0 if the system does not tell."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1024, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] / 1e6 for s in sizes if s[-1:] in units), default=0.0)


def _best_s(run: Callable[[], object], threads: int) -> float:
    """Of one thread its CPU time, in which other processes have no part; of several the time of the slowest."""
    clock = time.process_time if threads == 1 else time.perf_counter
    run()
    best = float("inf")
    end = time.perf_counter() + _TRIES_S
    while time.perf_counter() < end:
        start = clock()
        run()
        best = min(best, clock() - start)
    return best


def _gops(run: Callable[[], object], threads: int, depth: int = 1) -> float:
    return 2.0 * _ROWS * _WIDTH * _WIDTH * depth / _best_s(run, threads) / 1e9


def _by_numpy(threads: int) -> Iterator[Peak]:
    if threads == 1:  # its BLAS was given one thread, for the reading
        a, b = np.ones((_ROWS, _WIDTH), np.float32), np.ones((_WIDTH, _WIDTH), np.float32)
        yield "float32", _gops(lambda: a @ b, threads), "numpy"


def _by_torch(threads: int) -> Iterator[Peak]:
    import torch

    torch.set_num_threads(threads)
    for name in ("float32", "bfloat16"):
        a, b = (torch.ones(rows, _WIDTH, dtype=getattr(torch, name)) for rows in (_ROWS, _WIDTH))
        yield name, _gops(lambda a=a, b=b: a @ b, threads), "torch"  # type: ignore[misc]


def _by_openvino(threads: int) -> Iterator[Peak]:
    """A stack of linear layers, as the plugin runs them: int8 from a fake quantization and stored int8 weights."""
    if importlib.util.find_spec("openvino") is None:
        return
    import openvino as ov
    from openvino import opset13 as op

    for precision, hint in (("float32", "f32"), ("bfloat16", "bf16"), ("int8", "bf16")):
        data = op.parameter([_ROWS, _WIDTH], np.float32)
        x: Any = data
        rng = np.random.default_rng(0)
        for _ in range(_DEPTH):
            whole = rng.integers(-127, 128, (_WIDTH, _WIDTH)).astype(np.int8)
            if precision == "int8":
                low, high = (op.constant(np.array(v, np.float32)) for v in (0.0, 2.55))
                x = op.fake_quantize(x, low, high, low, high, 256)
                weights = op.multiply(op.convert(op.constant(whole), "f32"), op.constant(np.float32(1e-4)))
            else:
                weights = op.constant(whole.astype(np.float32) * np.float32(1e-4))
            x = op.matmul(x, weights, False, True)
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "ENABLE_CPU_PINNING": False}
        settings |= {"PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        compiled = ov.Core().compile_model(ov.Model([x], [data]), "CPU", settings)
        request = compiled.create_infer_request()
        given = {0: np.ones((_ROWS, _WIDTH), np.float32)}
        yield precision, _gops(lambda r=request, g=given: r.infer(g, share_inputs=True), threads, _DEPTH), "OpenVINO"  # type: ignore[misc]


if __name__ == "__main__":
    main()
