"""How long emergencies wait beside routine requests in a stream, and whether anything is lost or out of order.

    python benchmarks/streaming.py [--bundle engines/x] [--requests 4000] [--write]

Requests arrive at random (Poisson, seed 0): 5 % emergencies, 15 % background. Waits count from when a request was due
to arrive, even if the stream, being full, had not read it yet, to when the consumer has its answer. The model is a
sleep of fixed length per batch, so that the figures are the stream's own; --bundle adds a real one with its
measured rate. --write puts the tables into benchmarks/results/streaming.md.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import medcompile
from medcompile.runtime.deadlines import Priority, Request
from medcompile.runtime.stream import Stream

RESULT = Path(__file__).parent / "results" / "streaming.md"
BATCH, CAPACITY, MAX_LATENCY_MS = 8, 256, 50.0
SETTINGS: dict[str, Any] = {"batch": BATCH, "capacity": CAPACITY, "max_latency_ms": MAX_LATENCY_MS}
RUN_MS, ITEM_MS = 5.0, 2.5
NOTE = "Metformin was stopped for acute kidney injury; the patient denies chest pain."


@dataclass(frozen=True)
class Model:
    """What is streamed through: value is every request's; rate: requests per second in full batches."""

    name: str
    value: Any
    rate: float
    stream: Callable[[Iterator[Any]], Stream[Any, Any]]


@dataclass
class Source:
    """Gives request i once its time has come; read: how many were given."""

    model: Model
    due_s: np.ndarray[Any, Any]
    priorities: list[str]
    read: int = 0
    began_s: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[Request[Any]]:
        for i, priority in enumerate(self.priorities):
            time.sleep(max(0.0, self.began_s + self.due_s[i] - time.monotonic()))
            self.read += 1
            yield Request(self.model.value, priority, str(i))


def sleeping() -> Model:
    def run(values: list[Any]) -> list[Any]:
        time.sleep((RUN_MS + ITEM_MS * len(values)) / 1000)
        return values

    name = f"a sleep of {RUN_MS:g} ms a batch and {ITEM_MS:g} ms a request"
    rate = 1000 * BATCH / (RUN_MS + ITEM_MS * BATCH)
    return Model(name, None, rate, partial(Stream, run=run, **SETTINGS))


def real(path: str) -> Model:
    """A bundle's image tower on a JPEG file in memory, decoded every time, or its text embeddings."""
    session = medcompile.load(path)
    name = f"{session.bundle.name} {session.variant.name} on {session.target.name}"
    if "image" in session.bundle.graphs:
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        PIL.Image.fromarray(noise).resize((512, 512)).save(file, "JPEG")
        one, embed = file.getvalue(), session.embed_images
        return Model(
            f"{name}, JPEG images of 512 x 512", one, _rate(embed, one), partial(session.towers.stream, **SETTINGS)
        )
    return Model(
        f"{name}, one sentence each", NOTE, _rate(session.embed, NOTE), partial(Stream, run=session.embed, **SETTINGS)
    )


def _rate(embed: Callable[[list[Any]], Any], one: Any) -> float:
    embed([one] * BATCH)
    start = time.perf_counter()
    for _ in range(20):
        embed([one] * BATCH)
    return 20 * BATCH / (time.perf_counter() - start)


def load(model: Model, requests: int, share: float, *, priorities: bool = True) -> Source:
    """Arrivals at share of the model's rate; the same ones whether they have priorities or not."""
    rng = np.random.default_rng(0)
    due_s = np.cumsum(rng.exponential(1 / (share * model.rate), requests))
    kinds = rng.choice([p.value for p in Priority], requests, p=[0.05, 0.8, 0.15]).tolist()
    return Source(model, due_s, kinds if priorities else [Priority.ROUTINE.value] * requests)


def measured(source: Source, kinds: list[str]) -> dict[str, Any]:
    """Waits in ms by kind, and what went wrong. kinds: of each request, whether or not the stream knew."""
    waits: dict[str, list[float]] = {p.value: [] for p in Priority}
    last: dict[str, int] = {}
    disorder, seen = 0, []
    with source.model.stream(iter(source)) as answers:
        for answer in answers:
            waits[kinds[answer.index]].append(1000 * (time.monotonic() - source.began_s - source.due_s[answer.index]))
            disorder += answer.index < last.get(answer.priority, -1)
            last[answer.priority] = answer.index
            seen.append(answer.index)
    return {**waits, "lost": len(kinds) - len(set(seen)), "doubled": len(seen) - len(set(seen)), "disorder": disorder}


def waits_table(model: Model, requests: int) -> list[str]:
    lines = [
        f"## {model.name}",
        "",
        f"{requests} requests, batches of {BATCH}, {model.rate:.0f} requests/s in full batches, "
        f"max_latency {MAX_LATENCY_MS:g} ms, capacity {CAPACITY}. Waits in ms.",
        "",
        "| load | priorities | emergency p50 | p99 | routine p50 | p99 | background p50 | p99 "
        "| lost | twice | disorder |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for share in (0.5, 0.8, 1.1, 1.5):
        for known in (True, False):
            source = load(model, requests, share, priorities=known)
            got = measured(source, load(model, requests, share).priorities)
            cells = [f"{np.percentile(got[p.value], q):.0f}" for p in Priority for q in (50, 99)]
            counts = [str(got[name]) for name in ("lost", "doubled", "disorder")]
            lines.append(" | ".join([f"| {share:.0%}", "yes" if known else "no", *cells, *counts]) + " |")
            print(lines[-1], flush=True)
    return [*lines, ""]


def consumers_table(model: Model, requests: int) -> list[str]:
    """A consumer that is slower than the model, and one that dies: what was read, delivered and handed back."""
    lines = [
        "## Consumers that are slow or die",
        "",
        "| consumer | read | delivered | handed back as pending | lost | most in memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, pause_s, dies_after in (
        ("takes 5 ms an answer", 0.005, requests),
        ("dies after 100", 0.0, 100),
        ("takes 5 ms, dies after 300", 0.005, 300),
    ):
        source = load(model, requests, 3.0)
        delivered, most = 0, 0
        with source.model.stream(iter(source)) as answers:
            for _ in answers:
                delivered += 1
                most = max(most, source.read - delivered + 1)
                time.sleep(pause_s)
                if delivered == dies_after:
                    break
        back = len(answers.pending)
        lines.append(f"| {name} | {source.read} | {delivered} | {back} | {source.read - delivered - back} | {most} |")
    return [*lines, ""]


def overhead_line(requests: int = 20_000) -> str:
    """What the stream itself costs: a model that does nothing, a source that never waits."""
    start = time.perf_counter()
    count = sum(1 for _ in Stream(range(requests), lambda v: v, batch=BATCH, max_latency_ms=0, capacity=CAPACITY))
    each = 1e6 * (time.perf_counter() - start) / count
    return f"The stream itself costs {each:.0f} us a request (threads and locks, with a model that does nothing)."


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--bundle")
    arguments.add_argument("--requests", type=int, default=4000)
    arguments.add_argument("--write", action="store_true")
    given = arguments.parse_args()
    lines = [
        "# Streaming",
        "",
        "Made by `benchmarks/streaming.py`, which says how waits are counted; "
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}.",
        "Without priorities, the very same arrivals are all routine. "
        "At 150 % more may wait than the stream has capacity",
        "for: what it has not read it can't put in order, and every kind waits for that.",
        "",
        *waits_table(sleeping(), given.requests),
    ]
    if given.bundle:
        lines += waits_table(real(given.bundle), given.requests)
    lines += [*consumers_table(sleeping(), 1000), overhead_line()]
    print("\n".join(lines))
    if given.write:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
