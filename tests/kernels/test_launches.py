"""Plans of a step: right for every batch of a shape, whatever its sequences' lengths are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcompile.errors import BackendError
from medcompile.kernels import launches
from medcompile.kernels.launches import Face, Kernel

TINYLLAMA = Face(32, 4, 64, 32)


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    kernel=st.sampled_from(["chunks", "steps"]),
    group=st.sampled_from([1, 3, 4, 8, 20]),
)
def test_there_is_a_tile_for_every_token_of_every_sequence(lengths: list[int], kernel: Kernel, group: int) -> None:
    face = Face(group * 2, 2, 64, 32)
    size = face.tokens(kernel)
    grid = launches._grid(face, kernel, sum(lengths), len(lengths))
    taken: set[int] = set()
    start = 0
    for i, length in enumerate(lengths):
        tiles = range(start // size + i, start // size + i + -(-length // size))
        assert taken.isdisjoint(tiles)
        taken.update(tiles)
        start += length
    assert all(0 <= tile < grid[0] for tile in taken)


def test_long_prompts_go_in_large_tiles_and_single_tokens_share_their_keys_out() -> None:
    assert [x.kernel for x in launches.plan(TINYLLAMA, 512, 1, 64).launches] == ["write", "chunks"]
    decode = launches.plan(TINYLLAMA, 1, 1, 64)
    assert [x.kernel for x in decode.launches] == ["write", "splits", "reduce"]
    assert decode.splits == 8  # 2,048 keys at most, no fewer than 256 each
    assert decode.launches[1].grid == (1, 4, 8)
    assert decode.launches[2].grid == (1, 32, 1)


def test_a_batch_that_fills_the_gpu_by_itself_is_not_split() -> None:
    step = launches.plan(TINYLLAMA, 128, 128, 64)
    assert [x.kernel for x in step.launches] == ["write", "steps"]
    assert step.partial_bytes == step.stats_bytes == 0


@given(tokens=st.integers(1, 3000), sequences=st.integers(1, 200), table=st.integers(1, 500))
def test_no_plan_takes_more_workspace_than_was_asked_for(tokens: int, sequences: int, table: int) -> None:
    step = launches.plan(TINYLLAMA, tokens, sequences, table)
    assert step.partial_bytes + step.stats_bytes <= launches.workspace_bytes(TINYLLAMA, 3000, 200)
    assert step.partial_bytes + step.stats_bytes <= launches.workspace_bytes(TINYLLAMA, tokens, sequences)


@pytest.mark.parametrize(
    ("face", "named"),
    [
        ((5, 2, 64, 32), "kv_heads"),
        ((4, 2, 60, 32), "head_dim 60"),
        ((4, 2, 256, 32, "float16", "float32"), "head_dim 256 in float32"),
    ],
)
def test_a_face_that_the_kernels_do_not_take_is_refused_with_its_reason(face: tuple[Any, ...], named: str) -> None:
    with pytest.raises(BackendError, match=named):
        Face(*face)
