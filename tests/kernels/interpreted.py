"""The Triton kernels in Triton's interpreter, in a process of its own: it must be told so before triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np

from medcompile.kernels import launches
from medcompile.kernels.launches import Face, Step
from tests.kernels.batches import Array


@contextmanager
def process() -> Iterator[ProcessPoolExecutor]:
    """Where run() runs: `pool.submit(run, ...).result()`."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_be_told) as pool:
        yield pool


def _be_told() -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run(face: Face, step: Step, arrays: tuple[Array, ...], scale: float, sliding_window: int) -> tuple[Array, ...]:
    """Output and pools after the step's launches, which read from memory full of NaN whatever they did not write."""
    import torch

    from medcompile.kernels import triton_attention

    _multiply_bfloat16()
    names = ("q", "k", "v", "k_pool", "v_pool", "query_starts", "past_lens", "block_table")
    values: dict[str, Any] = {name: _tensor(array) for name, array in zip(names, arrays, strict=True)}
    values["out"] = torch.full_like(values["q"], float("nan"))
    values["partial"] = torch.full((max(1, step.partial_bytes // 4),), float("nan"))
    values["stats"] = torch.full((max(1, step.stats_bytes // 4),), float("nan"))
    values |= {"sequences": len(arrays[6]), "table_width": arrays[7].shape[1], "splits": step.splits}
    values |= {"scale": scale, "window": launches.window(sliding_window)}
    for launch in step.launches:
        variant = triton_attention.variant(face, launch.kernel)
        given = {name: values[name] for name in variant.function.arg_names if name in values}
        variant.function[launch.grid](**given, **variant.constants)
    return tuple(
        _array(values[name], like) for name, like in (("out", arrays[0]), *zip(names[3:5], arrays[3:5], strict=True))
    )


def _multiply_bfloat16() -> None:
    """The interpreter keeps bfloat16 as uint16, and its dot() would multiply those integers: let it widen them."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    given = InterpreterBuilder.create_dot
    if given.__name__ == "create_dot":

        def widening(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
            return given(self, *wide, *rest)

        InterpreterBuilder.create_dot = widening


def _tensor(array: Array) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Any, like: Array) -> Array:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(like.dtype)
    return tensor.numpy()
