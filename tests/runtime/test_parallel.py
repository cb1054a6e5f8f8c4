"""Streams: what runs side by side, in which order answers come, and who closes what."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from medcompile.backends import Executor
from medcompile.errors import BackendError, InputError
from medcompile.runtime.parallel import StreamedExecutor, load_streamed
from medcompile.spec import Axis, GraphSpec, Profile, Target, TensorSpec, Variant

SPEC = GraphSpec(
    "toy",
    (TensorSpec("x", "int64", ("batch", "sequence")), TensorSpec("y", "int64", ("batch", "sequence"))),
    (TensorSpec("sum", "int64", ("batch",)),),
    (Profile("default", (Axis("batch", 1, 8, 64), Axis("sequence", 1, 8, 512))),),
)


class Adder(Executor):
    """Sums the rows of x and y; notes how many rows came, and waits for a partner where it is told to."""

    def __init__(self, meeting: threading.Barrier | None = None) -> None:
        super().__init__(SPEC)
        self.rows: list[int] = []
        self.is_closed = False
        self._meeting = meeting

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.rows.append(len(feeds["x"]))
        if self._meeting is not None:
            self._meeting.wait(timeout=20)
        if (feeds["x"] < 0).any():
            raise BackendError("negative")
        return {"sum": (feeds["x"] + feeds["y"]).sum(axis=1)}

    def close(self) -> None:
        self.is_closed = True


def feeds(rows: int, length: int = 128, start: int = 0) -> dict[str, np.ndarray]:
    x = np.arange(start, start + rows * length, dtype=np.int64).reshape(rows, length)
    return {"x": x, "y": x * 3}


def opened(streams: int = 2, meeting: threading.Barrier | None = None) -> tuple[StreamedExecutor, Adder, Adder]:
    wide, narrow = Adder(), Adder(meeting)
    return StreamedExecutor(wide, lambda: narrow, streams), wide, narrow


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 33])
def test_a_batch_in_pieces_gives_what_it_gives_whole(rows: int) -> None:
    streamed, wide, narrow = opened()
    with streamed:
        np.testing.assert_array_equal(streamed.run(feeds(rows))["sum"], Adder().run(feeds(rows))["sum"])
    assert (wide.rows, sum(narrow.rows)) == (([1], 0) if rows == 1 else ([], rows))


def test_pieces_have_tokens_enough_and_every_stream_has_one() -> None:
    streamed, _, narrow = opened()
    with streamed:
        streamed.run(feeds(8, 128))
        streamed.run(feeds(16, 32))
        streamed.run(feeds(8, 16))
        streamed.run(feeds(3, 512))
    assert narrow.rows == [2, 2, 2, 2, 8, 8, 4, 4, 1, 1, 1]


def test_streams_run_at_once() -> None:
    streamed, _, narrow = opened(3, threading.Barrier(3))  # a run that were alone would break the barrier
    with streamed:
        streamed.run(feeds(3))
    assert narrow.rows == [1, 1, 1]


def test_batches_come_back_in_order_and_are_not_read_far_ahead() -> None:
    streamed, wide, _ = opened()
    read = []

    def source() -> Iterator[dict[str, np.ndarray]]:
        for i in range(20):
            read.append(i)
            yield feeds(1, start=i)

    with streamed:
        ahead = []
        for i, outputs in enumerate(streamed.run_each(source())):
            np.testing.assert_array_equal(outputs["sum"], Adder().run(feeds(1, start=i))["sum"])
            ahead.append(len(read) - i)
    assert i == 19
    assert max(ahead) <= 2 * streamed.streams + 1
    assert wide.rows == []


def test_a_batch_that_comes_alone_is_cut() -> None:
    streamed, _, narrow = opened()
    with streamed:
        assert len(list(streamed.run_each([feeds(8)]))) == 1
        assert list(streamed.run_each([])) == []
    assert narrow.rows == [2, 2, 2, 2]


def test_an_error_comes_in_its_turn() -> None:
    streamed, _, _ = opened()
    bad = {name: -array - 1 for name, array in feeds(1).items()}
    with streamed:
        answers = streamed.run_each([feeds(1), bad, feeds(1)])
        next(answers)
        with pytest.raises(BackendError, match="negative"):
            next(answers)
        with pytest.raises(InputError):
            streamed.run({"x": np.zeros((4, 4), np.int64)})
        assert len(streamed.run(feeds(8))["sum"]) == 8


def test_both_are_closed_and_nothing_runs_afterwards() -> None:
    streamed, wide, narrow = opened()
    streamed.run(feeds(8))
    streamed.close()
    assert wide.is_closed
    assert narrow.is_closed
    with pytest.raises(BackendError, match="closed"):
        streamed.run(feeds(8))


def test_closing_between_batches_is_told() -> None:
    streamed, _, _ = opened()
    answers = streamed.run_each(feeds(1) for _ in range(20))
    next(answers)
    streamed.close()
    with pytest.raises(BackendError, match="closed"):
        list(answers)


class Gated(Adder):
    """Runs as often as the gate lets it."""

    gate = threading.Semaphore(1)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.gate.acquire(timeout=20)
        return super().run(feeds)


def test_what_still_waits_for_a_stream_when_it_is_closed_is_told() -> None:
    streamed = StreamedExecutor(Adder(), Gated, 2)
    answers = streamed.run_each(feeds(1) for _ in range(5))
    next(answers)
    threading.Timer(0.1, Gated.gate.release, (20,)).start()  # closing waits for the two runs under way
    streamed.close()
    assert len([next(answers), next(answers)]) == 2
    with pytest.raises(BackendError, match="closed"):
        next(answers)


class Device:
    """A backend that has streams, of which nothing but load() is asked."""

    name, targets = "toy", ("toy-cpu",)

    def __init__(self) -> None:
        self.made: list[int] = []

    def load(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None) -> Executor:
        return Adder()

    def load_streams(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, streams: int) -> Executor:
        self.made.append(streams)
        return Adder()

    def probe(self, target: str) -> Target:
        raise NotImplementedError

    def build(self, *args: object) -> object:
        raise NotImplementedError


FIXED = GraphSpec("fixed", (TensorSpec("x", "int64", (1, 8)),), (TensorSpec("sum", "int64", (1,)),), ())
LARGE = GraphSpec(
    "large", SPEC.inputs, SPEC.outputs, (Profile("default", (Axis("batch", 4, 8, 64), Axis("sequence", 1, 8, 512))),)
)
WHOLE = GraphSpec("whole", SPEC.inputs, (TensorSpec("sum", "int64", ()),), SPEC.profiles)


@pytest.mark.parametrize(
    ("spec", "device", "threads", "streams", "expected"),
    [
        (SPEC, "cpu", 2, None, 2),
        (SPEC, "cpu", 8, 3, 3),
        (SPEC, "cpu", 1, None, 1),
        (SPEC, "cpu", 2, 1, 1),
        (SPEC, "cpu", 2, 8, 2),
        (SPEC, "cuda", 2, None, 1),
        (FIXED, "cpu", 2, None, 1),
        (LARGE, "cpu", 2, None, 1),
        (WHOLE, "cpu", 2, None, 1),
    ],
)
def test_who_gets_streams(spec: GraphSpec, device: str, threads: int, streams: int | None, expected: int) -> None:
    backend = Device()
    target = Target("toy-cpu", "toy", device, "x86_64", "linux", "1")
    executor = load_streamed(backend, Path(), spec, Variant("fp32"), target, threads, streams)  # type: ignore[arg-type]
    assert executor.streams == expected
    assert backend.made == []
    if expected > 1:
        executor.run(feeds(8))
        executor.run(feeds(8))
        assert backend.made == [expected]
