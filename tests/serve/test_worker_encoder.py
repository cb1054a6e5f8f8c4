"""Encoders in a worker: items in common batches, run at once where nobody else waits, and each job told once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import medcompile
from medcompile.errors import InputError
from medcompile.runtime.session import Session
from medcompile.serve.frames import Frame
from medcompile.serve.worker_encoder import EncoderDesk, Kind
from tests.tiny import Workshop


class Told:
    """A line that remembers what was sent on it."""

    def __init__(self) -> None:
        self.answers: dict[int, Any] = {}
        self.threads: set[str] = set()
        self.changed = threading.Condition()

    def send(self, *frames: tuple[Mapping[str, Any], Any]) -> None:
        with self.changed:
            for header, _ in frames:
                assert header["id"] not in self.answers
                self.answers[header["id"]] = header
            self.threads.add(threading.current_thread().name)
            self.changed.notify_all()

    def fail(self, number: int, error: BaseException) -> None:
        self.send(({"id": number, "error": error}, b""))

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.answers) >= count, 20)


@pytest.fixture(scope="module")
def session(small: Workshop) -> Iterator[Session]:
    with medcompile.load(small.bundle, backend="onnxruntime", variant="fp32", threads=1) as loaded:
        yield loaded


@pytest.fixture
def desk(session: Session) -> tuple[EncoderDesk, Told]:
    told = Told()
    return EncoderDesk(session, told, 1000), told  # type: ignore[arg-type]


def frame(number: int, *texts: str, priority: str = "routine") -> Frame:
    return Frame({"op": "embed", "id": number, "priority": priority, "texts": list(texts)})


class Gate:
    """A model that waits until it is let go on, and remembers its batches."""

    def __init__(self, desk: EncoderDesk) -> None:
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        desk._kinds["embed"] = Kind(self.run, lambda text: (text, len(text)))

    def run(self, texts: list[str]) -> list[Any]:
        self.batches.append(texts)
        self.entered.set()
        assert self.open.wait(20)
        if "bad" in texts:
            raise InputError("bad")
        if "bug" in texts:
            raise ValueError("bug")
        return [np.zeros(2, np.float32) for _ in texts]


def test_a_request_that_comes_alone_is_run_by_the_thread_that_read_it(desk: tuple[EncoderDesk, Told]) -> None:
    its, told = desk
    its.take(frame(1, "chest pain"), alone=True)
    assert told.answers[1]["tokens"] == 2
    assert told.threads == {threading.current_thread().name}
    its.take(frame(2, "chest pain"), alone=False)
    told.wait(2)
    assert len(told.threads) == 2


def test_what_comes_while_the_model_runs_goes_in_one_batch_the_urgent_first(desk: tuple[EncoderDesk, Told]) -> None:
    its, told = desk
    gate = Gate(its)
    its.take(frame(0, "first"), alone=False)
    assert gate.entered.wait(20)
    for number in range(1, 9):
        its.take(frame(number, "x" * 20, "y" * 20), alone=True)  # one runs, so nothing is run at once
    its.take(frame(9, "z" * 500, priority="emergency"), alone=True)
    assert its.stats()["waiting"] == 9
    gate.open.set()
    told.wait(10)
    assert [len(batch) for batch in gate.batches] == [1, 1, 16]
    assert gate.batches[1] == ["z" * 500]
    assert told.answers[3]["batch"] == 16


def test_one_bad_item_fails_its_own_request_and_no_other(desk: tuple[EncoderDesk, Told]) -> None:
    its, told = desk
    gate = Gate(its)
    its.take(frame(0, "first"), alone=False)
    assert gate.entered.wait(20)
    for number, text in enumerate(["good", "bad", "bug", "also good"], 1):
        its.take(frame(number, text), alone=False)
    its.take(frame(5, "good", "bad"), alone=False)
    gate.open.set()
    told.wait(6)
    assert [type(told.answers[n].get("error")) for n in range(1, 6)] == [
        type(None),
        InputError,
        ValueError,
        type(None),
        InputError,
    ]
    assert "item 1" in str(told.answers[5]["error"])


def test_a_request_that_is_given_up_is_not_run(desk: tuple[EncoderDesk, Told]) -> None:
    its, told = desk
    gate = Gate(its)
    its.take(frame(0, "first"), alone=False)
    assert gate.entered.wait(20)
    its.take(frame(1, "gone"), alone=False)
    its.take(frame(2, "there"), alone=False)
    its.cancel(1)
    gate.open.set()
    told.wait(2)
    time.sleep(0.05)
    assert gate.batches[1:] == [["there"]]
    assert set(told.answers) == {0, 2}
    assert its.stats()["running"] == its.stats()["waiting"] == 0
