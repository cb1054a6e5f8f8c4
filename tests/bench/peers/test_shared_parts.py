"""What contenders share: batch sizes tuned once for each cell, greedy answers with their times, int4 blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from medcompile.bench.peer import Answer, Batch, Cell, Job
from medcompile.bench.peers import _decoding, _runner


class Clock:
    """Time that only its owner moves."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now


def test_the_fastest_batch_size_is_found_once_for_each_cell_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(_runner, "time", clock)
    calls: list[tuple[int, int]] = []
    cost = {1: 900, 8: 100, 32: 400}

    def call(items: Sequence[str], size: int) -> Answer:
        calls.append((len(items), size))
        clock.now += cost[size]
        return Answer(np.zeros((len(items), 2)))

    runner = _runner.tuned_runner(call, {"threads": 1})
    many = Batch(Cell(100), items=tuple(map(str, range(100))))
    for _ in range(2):
        answer = runner.run(many)
        assert answer.values is not None and len(answer.values) == 100
    assert calls == [(32, 32), (64, 1), (64, 8), (64, 32), (100, 8), (100, 8)]
    assert runner.notes == {"threads": 1, "batch size, 100": 8}
    calls.clear()
    runner.run(Batch(Cell(3), items=("a", "b", "c")))
    assert calls == [(3, 1)]  # no larger size is worth a try


def test_a_greedy_answer_has_rows_and_the_time_of_each_step() -> None:
    answer = _decoding.answer([[1, 2], [3, 4], [5, 6]], 100, [150, 160, 175])
    assert answer.values is not None
    assert answer.values.tolist() == [[1, 3, 5], [2, 4, 6]]
    assert (answer.first_ns, answer.steps_ns) == (50, (10, 15))


@pytest.mark.parametrize(("hidden", "intermediate", "size"), [(2048, 5632, 128), (256, 688, 16), (96, 160, 32)])
def test_blocks_divide_every_linear_layers_inputs(hidden: int, intermediate: int, size: int) -> None:
    assert _decoding.block_size(hidden, intermediate, 128) == size


def test_the_context_has_room_for_the_longest_row() -> None:
    job = Job("llama", "generate", cells=(Cell(1, 512, 1), Cell(8, 128, 64)))
    assert _decoding.context(job) == 513


def test_vectors_are_normalized_and_zeros_stay_finite() -> None:
    rows = _runner.normalized(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]])
