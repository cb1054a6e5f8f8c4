"""A contender whose options are ways to behave: what the harness must survive."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from medcompile.bench.peer import Answer, Batch, Job, Missing, Note, Peer, Runner

WAYS = ("good", "slow", "prints", "nan", "wrong", "raises", "crashes", "hangs", "killed", "no-load", "forks")


class FakeRunner:
    def __init__(self, way: str) -> None:
        self.way = way
        self.runs = 0
        self.notes: dict[str, Note] = {"engine": "fake", "precision": "int8" if way == "slow" else "float32"}

    def run(self, batch: Batch) -> Answer:
        self.runs += 1
        time.sleep(0.03 if self.way == "slow" else 0.002)
        if self.way == "prints":
            sys.stdout.write("a library that prints\n{}\n")
            sys.stdout.flush()
            os.write(1, b"and one that writes to the descriptor\n")
        if self.runs == 12:  # in the rounds, after the warm-up
            self._misbehave()
        ids = batch.feeds["input_ids"].astype(np.float32)
        values = np.stack([ids.sum(axis=1), ids[:, 0], np.ones(len(ids), np.float32)], axis=1)
        if self.way == "nan":
            values[0, 0] = np.nan
        return Answer(values[:, ::-1] * [1, -1, 1] if self.way == "wrong" else values)

    def _misbehave(self) -> None:
        if self.way == "raises":
            raise ValueError("no such shape")
        if self.way == "crashes":
            sys.stderr.write("Segmentation fault, more or less\n")
            sys.stderr.flush()
            os._exit(7)
        if self.way == "hangs":
            time.sleep(3600)
        if self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None: ...


class Fake(Peer):
    name = "fake"
    title = "fake"
    tasks = ("embed", "generate")
    needs_source = False
    reference = True

    def missing(self, job: Job) -> Missing | None:
        if job.family == "broken":
            raise RuntimeError("its file is at fault")
        return super().missing(job)

    def options(self, job: Job) -> tuple[str, ...]:
        return WAYS

    def open(self, job: Job) -> Runner:
        if job.option == "no-load":
            raise OSError("no such model")
        if job.option == "forks" and os.fork() == 0:
            time.sleep(3600)
        return FakeRunner(job.option)


PEER = Fake()
