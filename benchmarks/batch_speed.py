"""How fast batch files are answered, and whether memory stays the same however large they are.

    python benchmarks/batch_speed.py [--bundle engines/quickstart] [--gigabytes 10] [--lines 2000] [--write]

Two parts, of which --only takes one. The first (Size) takes the model away: every request is answered at once by a few
bytes, so that what is left is reading, checking, ordering and writing. Files up to --gigabytes of clinical-looking
notes, short or as long as charts, each in a process of its own whose peak memory is told. The second (Model) asks a
real bundle for embeddings of notes of mixed length: lines per second by how many are in flight, beside the session
itself with all texts in one call, and without any batching at all. --write puts the tables into
benchmarks/results/batch_speed.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

import medcompile
from medcompile.resources import peak_rss_bytes
from medcompile.serve.batch import Batch, Job
from medcompile.serve.batch_lines import Answered, Request, parsed
from medcompile.serve.duplicates import find
from medcompile.serve.files import JsonLines
from medcompile.serve.spool import Spool

RESULT = Path(__file__).parent / "results" / "batch_speed.md"
URL = "/v1/embeddings"
TEXT = (
    "the patient was started on metformin for type two diabetes and denies chest pain dyspnoea fever or weight loss "
    "on examination the lungs are clear heart sounds normal abdomen soft renal function stable creatinine potassium "
    "follow up in six weeks with repeat bloods continue current medication discussed with family"
)
WORDS = TEXT.split()
SHORT, LONG = (20, 80), (3000, 9000)
FILES = ((0.002, SHORT), (0.02, SHORT), (0.01, LONG), (0.1, LONG), (1.0, LONG))
"""Shares of the largest, and words of each note: a line of a report, or a whole chart of 20 to 60 KB."""
IN_FLIGHT = (1, 8, 64, 512, 2048)
SIZES, MODEL = "Size", "Model"


def note(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def write_large(path: Path, size_bytes: int, words: tuple[int, int]) -> None:
    """Notes of so many words, 200 different ones, under ids of their own."""
    chance = random.Random(0)
    bodies = [orjson.dumps({"model": "m", "input": note(chance, chance.randint(*words))}) for _ in range(200)]
    written = number = 0
    with path.open("wb", buffering=1 << 22) as file:
        while written < size_bytes:
            number += 1
            written += file.write(
                b'{"custom_id":"note-%d","method":"POST","url":"%b","body":%b}\n'
                % (number, URL.encode(), bodies[number % len(bodies)])
            )


async def at_once(_: Request, __: str) -> Answered:
    return Answered(200, b'{"object":"list","data":[]}')


async def ready(_: Request) -> None: ...


def child(path: Path, out: Path) -> None:
    """One batch without a model; figures on stdout."""
    source = JsonLines(path)
    with Spool(out, {"input": source.identity()}) as spool:
        job = Job(source, lambda record: parsed(record, [URL]), at_once, ready)
        made = asyncio.run(Batch(job, spool, lambda _: None).run())
        began_s = time.monotonic()
        spool.flush()
        assert find(spool.ids).count == 0
        checked_s = time.monotonic() - began_s
        spool.finish()
    told = {"lines": made.records, "seconds": made.seconds, "checked_s": checked_s, "peak": peak_rss_bytes()}
    sys.stdout.write(json.dumps(told))


def without_model(folder: Path, largest_bytes: int) -> Iterator[str]:
    yield "| file | words a note | lines | seconds | lines/s | MB/s | looking for duplicates, s | peak memory |"
    yield "|---|---|---|---|---|---|---|---|"
    for share, words in FILES:
        path, out = folder / "in.jsonl", folder / "out.jsonl"
        write_large(path, int(share * largest_bytes), words)
        size = path.stat().st_size
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(path), str(out)], check=True, stdout=subprocess.PIPE
        )
        told = json.loads(done.stdout)
        assert out.read_bytes()[:1] == b"{"
        rate, mb = told["lines"] / told["seconds"], size / told["seconds"] / 1e6
        yield (
            f"| {size / 1e9:.2f} GB | {words[0]} to {words[1]} | {told['lines']:,} | {told['seconds']:.1f} "
            f"| {rate:,.0f} | {mb:,.0f} | {told['checked_s']:.2f} | {told['peak'] / 2**20:.0f} MiB |"
        )
        path.unlink()
        out.unlink()


def with_model(folder: Path, bundle: Path, count: int) -> Iterator[str]:
    chance = random.Random(1)
    texts = [note(chance, round(min(120, 3 + chance.expovariate(1 / 30)))) for _ in range(count)]
    with medcompile.load(bundle) as session:
        name, what = session.bundle.name, f"{session.variant.name} on {session.target.name}"
        session.embed(texts[:64])
        began_s = time.monotonic()
        session.embed(texts)
        bare = count / (time.monotonic() - began_s)
        began_s = time.monotonic()
        for text in texts[: count // 8]:
            session.embed([text])
        alone = count // 8 / (time.monotonic() - began_s)
    yield f"{name}, {what}; {count:,} notes of 3 to 120 words, one a line.\n"
    yield "| | lines/s | of the session's | CPU a line, beside the model's process | peak memory, the same |"
    yield "|---|---|---|---|---|"
    yield f"| session.embed, one text a call | {alone:,.0f} | {alone / bare:.2f} | | |"
    yield f"| session.embed, all texts in one call | {bare:,.0f} | 1.00 | | |"
    path = folder / "in.jsonl"
    with path.open("wb") as file:
        for i, text in enumerate(texts):
            body = {"model": name, "input": text}
            file.write(orjson.dumps({"custom_id": str(i), "method": "POST", "url": URL, "body": body}) + b"\n")
    for in_flight in IN_FLIGHT:
        out = folder / f"{in_flight}.jsonl"
        rate, peak, cpu_s = command(bundle, path, out, in_flight)
        what = f"batch, {in_flight} in flight"
        yield f"| {what} | {rate:,.0f} | {rate / bare:.2f} | {1e3 * cpu_s / count:.2f} ms | {peak / 2**20:.0f} MiB |"


def command(bundle: Path, path: Path, out: Path, in_flight: int) -> tuple[float, int, float]:
    """Lines per second, loading aside; peak memory and CPU seconds of the process that is no model."""
    args = ["batch", str(path), "-o", str(out), "--bundle", str(bundle), "--in-flight", str(in_flight), "--json"]
    code = (
        "import json, resource, sys\nfrom medcompile.cli import app\nfrom medcompile.resources import peak_rss_bytes\n"
        f"try: app({args!r})\nfinally:\n u = resource.getrusage(resource.RUSAGE_SELF)\n"
        " sys.stderr.write('\\n' + json.dumps([peak_rss_bytes(), u.ru_utime + u.ru_stime]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["failed"] == 0
    peak, cpu_s = json.loads(done.stderr.splitlines()[-1])
    return told["per_second"], peak, cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("engines/quickstart"))
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="Where the files go; default: a temporary one.")
    parser.add_argument("--only", choices=(SIZES, MODEL))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        child(*told.child)
        return
    parts = {SIZES: lambda folder: without_model(folder, int(told.gigabytes * 1e9))}
    parts[MODEL] = lambda folder: with_model(folder, told.bundle, told.lines)
    for title in [told.only] if told.only else parts:
        print(f"## {title}\n")
        lines = []
        with tempfile.TemporaryDirectory(dir=told.folder) as folder:
            for row in parts[title](Path(folder)):
                print(row, flush=True)
                lines.append(row)
        if told.write:
            write(title, lines)


def write(title: str, lines: list[str]) -> None:
    """Put a section into the results, in the place of an older one."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    head = f"# Batch files\n\nMade by `benchmarks/batch_speed.py`, which says what is measured; {machine}."
    kept = RESULT.read_text(encoding="utf-8").split("\n\n## ")[1:] if RESULT.exists() else []
    sections = {section.partition("\n")[0]: section for section in kept}
    sections[title] = "\n".join([title, "", *lines])
    told = [head, *(sections[name].rstrip() for name in (SIZES, MODEL) if name in sections)]
    RESULT.write_text("\n\n## ".join(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
