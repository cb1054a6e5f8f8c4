"""One contender's process: it loads, warms up and runs when it is told to, and does nothing else.

    python -P worker.py PEER JOB.json look|prepare|serve

PEER is a file's name in peers/, or the path of a Python file that has a PEER. `look` says whether it can run, `prepare`
makes its files, `serve` answers one JSON line on stdout for each on stdin. Whatever a library prints goes to stderr.
Runs in any Python that has numpy, whether or not medcompile is installed there; imports nothing heavy of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from medcompile.bench.peer import Answer, Batch, Cell, Job, Peer, Runner

PREPARED = "prepared.json"
WARM_RUNS = 20
_SETTLED = 5
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def find_ourselves() -> None:
    """Make `import medcompile` mean the package that this file lies in, and add nothing else to the import path."""
    folder = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "medcompile", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["medcompile"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    find_ourselves()
    from medcompile import manifest
    from medcompile.bench import peers
    from medcompile.bench.peer import Job

    name, job_path, step = sys.argv[1:4]
    job: Job = manifest.decode(Job, json.loads(Path(job_path).read_text(encoding="utf-8")), "job")
    if job.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cpus)
    peer = peers.get(name)
    if step == "look":
        missing = peer.missing(job)
        found = {"missing": manifest.encode(missing), "options": [] if missing else list(peer.options(job))}
        _reply(replies, found)
    elif step == "prepare":
        _reply(replies, prepare(peer, job))
    else:
        serve(peer, job, replies)


def _reply(replies: TextIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


# ---- what is made once


def prepare(peer: Peer, job: Job) -> dict[str, Any]:
    """Fill the contender's folder, unless an earlier run did: the time and the memory that took."""
    from medcompile.bench import machine

    folder = work_folder(peer, job)
    done = folder / PREPARED
    if done.is_file():
        return dict(json.loads(done.read_text(encoding="utf-8")), reused=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    peer.prepare(replace(job, work=str(folder)))
    told = {"seconds": time.perf_counter() - start, "peak_bytes": machine.rss_bytes(peak=True)}
    done.write_text(json.dumps(told), encoding="utf-8")  # last: a folder without it is an unfinished one
    return told


def work_folder(peer: Peer, job: Job) -> Path:
    """Where this contender's files lie below job.work: another folder for whatever would change them."""
    parts: list[Any] = [peer.name, job.option, job.task, job.pooling, job.max_length, versions(peer)]
    for source in (job.source, job.calibration):
        if source:
            root = Path(source)
            files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
            parts.append(str(root))
            parts += [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    option = "".join(c if c.isalnum() else "-" for c in f"-{job.option}" if job.option)
    return Path(job.work) / f"{peer.name}{option}-{digest}"


def versions(peer: Peer) -> dict[str, str]:
    """Distribution -> version of every library that it needs."""
    wanted = {module.partition(".")[0] for module in peer.modules}
    owners = importlib.metadata.packages_distributions() if wanted else {}
    return {dist: importlib.metadata.version(dist) for m in sorted(wanted) for dist in sorted(set(owners.get(m, ())))}


# ---- what is timed


def serve(peer: Peer, job: Job, replies: TextIO) -> None:
    """Answer requests until stdin ends. A request that fails is answered with the error; the process lives on."""
    host = Host(peer, replace(job, work=str(work_folder(peer, job))))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = getattr(host, asked.pop("do"))(**asked)
        except Exception as error:  # noqa: BLE001  any library's error is this contender's result, told in the table
            told = {"error": f"{type(error).__name__}: {error}".strip()[:2000]}
        _reply(replies, told)
    host.close()


class Host:
    """A loaded contender, and the answers that its runs gave. Each public method is a request."""

    def __init__(self, peer: Peer, job: Job) -> None:
        from medcompile.bench import machine

        self._machine = machine
        self._peer = peer
        self._job = job
        self._runner: Runner | None = None
        self._batches: list[Batch] = []
        self._answers: dict[int, Answer] = {}
        self._gpu_before = 0

    def load(self) -> dict[str, Any]:
        """Open the contender: seconds, resident bytes after it, and what it says of itself."""
        gpu = self._machine.nvml()
        self._gpu_before = gpu.used_bytes() if gpu else 0
        before = self._machine.rss_bytes()
        start = time.perf_counter()
        self._runner = self._peer.open(self._job)
        return {
            "seconds": time.perf_counter() - start,
            "before_bytes": before,
            "rss_bytes": self._machine.rss_bytes(),
            "notes": dict(self._runner.notes),
            "versions": {"python": sys.version.split()[0]} | versions(self._peer),
        }

    def warm(self, cell: int, limit_s: float) -> dict[str, Any]:
        """Run that cell until five runs in a row agree to 5 %, or 20 times, or (after two) for limit_s.

        Its inputs replace those of the cell before.
        """
        self._machine.reset_peak()
        self._batches = read_batches(self._job, self._job.cells[cell])
        self._answers = {}
        took: list[int] = []
        while len(took) < WARM_RUNS and (len(took) < 2 or sum(took) < limit_s * 1e9):
            took.append(self._timed(-1 - len(took))[0])
            last = took[-_SETTLED:]
            if len(last) == _SETTLED and max(last) - min(last) <= 0.05 * statistics.median(last):
                break
        gc.collect()
        return {"ns": took}

    def run(self, first: int, count: int, lead: int) -> dict[str, Any]:
        """Runs first .. first + count - 1 of the cell, after lead runs that don't count: nanoseconds of each.

        run_cpu_ns: CPU time of those that count; cpu_ns: of the whole turn.
        """
        before = time.process_time_ns()
        for k in range(lead):
            self._timed(first - lead + k)
        took: list[int] = []
        firsts: list[int] = []
        steps: list[int] = []
        cpu = time.process_time_ns()
        for k in range(first, first + count):
            ns, answer = self._timed(k)
            took.append(ns)
            if answer.first_ns:
                firsts.append(answer.first_ns)
                steps += answer.steps_ns
        now = time.process_time_ns()
        return {"ns": took, "run_cpu_ns": now - cpu, "cpu_ns": now - before, "first_ns": firsts, "steps_ns": steps}

    def answers(self, path: str) -> dict[str, Any]:
        """Write what the runs of this cell answered, by batch; say what memory the cell took and what was decided."""
        write_answers(Path(path), self._answers)
        gpu = self._machine.nvml()
        used = max(0, gpu.used_bytes() - self._gpu_before) if gpu and self._peer.device == "cuda" else None
        notes = dict(self._runner.notes) if self._runner else {}
        return {"peak_bytes": self._machine.rss_bytes(peak=True), "gpu_bytes": used, "notes": notes}

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def _timed(self, k: int) -> tuple[int, Answer]:
        """Run k: batch k in turn. A decoder's prompts are turned round by one token with each time through them, so
        that no cache of prompts knows one; the answers of the first time are those that are kept."""
        assert self._runner is not None, "load comes first"
        turn, at = divmod(k, len(self._batches))
        batch = self._batches[at]
        if turn and batch.cell.new and batch.feeds:
            batch = replace(batch, feeds={name: _turned(ids, turn) for name, ids in batch.feeds.items()})
        start = time.perf_counter_ns()
        answer = self._runner.run(batch)
        took = time.perf_counter_ns() - start
        if batch.cell.new and answer.values is not None and answer.values.shape[1] != batch.cell.new:
            raise ValueError(f"generated {answer.values.shape[1]} tokens, not {batch.cell.new} as asked")
        if k >= 0 and at not in self._answers and not (turn and batch.cell.new):
            self._answers[at] = copied(answer)
        return took, answer


def _turned(ids: Any, by: int) -> Any:
    import numpy as np

    return np.ascontiguousarray(np.roll(ids, by, axis=1))


def copied(answer: Answer) -> Answer:
    """The answer in memory of its own: some engines give the same buffer again and again."""
    import numpy as np

    return answer if answer.values is None else replace(answer, values=np.array(answer.values))


# ---- files between the harness and this process


def read_batches(job: Job, cell: Cell) -> list[Batch]:
    """The cell's inputs as the harness left them in job.inputs: NAME.npz of rows, or NAME.json of items."""
    import numpy as np

    from medcompile.bench.peer import MODEL, Batch

    if job.clock == MODEL:
        with np.load(Path(job.inputs) / f"{cell.name}.npz", allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        rows = len(next(iter(arrays.values())))
        starts = range(0, rows - cell.batch + 1, cell.batch)
        return [
            Batch(cell, {n: np.ascontiguousarray(a[s : s + cell.batch]) for n, a in arrays.items()}) for s in starts
        ]
    items = json.loads((Path(job.inputs) / f"{cell.name}.json").read_text(encoding="utf-8"))
    return [
        Batch(cell, items=tuple(items[s : s + cell.batch])) for s in range(0, len(items) - cell.batch + 1, cell.batch)
    ]


def write_answers(path: Path, answers: Mapping[int, Answer]) -> None:
    """An .npz without pickle: `values-K` of batch K, and `spans-K` as JSON in bytes."""
    import numpy as np

    arrays: dict[str, Any] = {}
    for k, answer in answers.items():
        if answer.values is not None:
            arrays[f"values-{k}"] = answer.values
        if answer.spans:
            arrays[f"spans-{k}"] = np.frombuffer(json.dumps(answer.spans).encode(), np.uint8)
    np.savez(path, **arrays)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
