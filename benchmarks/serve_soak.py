"""A long run at a steady rate: memory, open files and errors of the server and its workers, minute by minute.

    python benchmarks/serve_soak.py name=BUNDLE [name=BUNDLE ...] [--minutes 20] [--share 0.8] [--out FILE]

First it is found out how many requests a second the server answers at all, with a closed loop of 16 clients; then
requests come at `share` of that, at random moments (a Poisson process), whatever the server does. Decoders get
completions (every second one streamed, every tenth given up by its client half-way), encoders embeddings of 1 to 200
words. Nothing may grow but the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serve_load import WORDS, ask  # noqa: E402
from medcompile import bundle  # noqa: E402
from medcompile.bench import machine  # noqa: E402
from tests.serve.servers import Server  # noqa: E402

PROBE_S = 20.0
EVERY_S = 60.0


@dataclass
class Run:
    """What came of the requests so far."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


def body(name: str, tasks: tuple[str, ...], number: int) -> tuple[str, dict[str, Any]]:
    words = " ".join(random.choices(WORDS, k=random.randint(1, 200)))
    if "generate" in tasks:
        asked = {"model": name, "prompt": words, "max_tokens": random.randint(4, 48), "stream": number % 2 == 0}
        return "/v1/completions", asked
    return "/v1/embeddings", {"model": name, "input": words, "encoding_format": "base64"}


async def one(host: str, port: int, models: list[tuple[str, tuple[str, ...]]], number: int, run: Run) -> None:
    path, asked = body(*models[number % len(models)], number)
    began_s = time.perf_counter()
    try:
        if number % 10 == 9 and path == "/v1/completions":
            async with asyncio.timeout(0.05):
                await ask(host, port, path, asked)
        status, _, answer = await ask(host, port, path, asked)
        run.statuses[str(status) if b'"error"' not in answer else f"{status} with an error"] += 1
    except TimeoutError:
        run.statuses["given up"] += 1
    except (OSError, asyncio.IncompleteReadError) as error:
        run.statuses[type(error).__name__] += 1
    run.seconds.append(time.perf_counter() - began_s)


async def capacity(host: str, port: int, models: list[tuple[str, tuple[str, ...]]]) -> float:
    """Requests a second that 16 clients get answered."""
    end_s, run, numbers = time.monotonic() + PROBE_S, Run(), iter(range(1 << 30))

    async def client() -> None:
        while time.monotonic() < end_s:
            await one(host, port, models, next(numbers), run)

    await asyncio.gather(*(client() for _ in range(16)))
    return len(run.seconds) / PROBE_S


async def steady(
    host: str, port: int, models: list[tuple[str, tuple[str, ...]]], rate: float, run: Run, end_s: float
) -> None:
    under_way: set[asyncio.Task[None]] = set()
    number, next_s = 0, time.monotonic()
    while next_s < end_s:
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        task = asyncio.create_task(one(host, port, models, number, run))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        number += 1
        next_s += random.expovariate(rate)
    await asyncio.gather(*under_way)


def held(pid: int) -> tuple[float, int]:
    """Resident MiB, and open files."""
    resident = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def soak(server: Server, models: list[tuple[str, tuple[str, ...]]], minutes: float, share: float) -> list[str]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    rate = share * await capacity(host, int(port), models)
    names = {"server": server.process.pid, **server.workers()}
    head = "| minute | requests | p50 ms | p99 ms | " + " | ".join(f"{n} MiB, files" for n in names) + " | statuses |"
    lines = [
        f"{rate:.1f} requests a second, {share:.0%} of what there is\n",
        head,
        "|" + "---|" * (head.count("|") - 1),
    ]
    print("\n".join(lines), flush=True)
    end_s = time.monotonic() + 60 * minutes
    run = Run()
    load = asyncio.create_task(steady(host, int(port), models, rate, run, end_s))
    minute = 0
    while not load.done():
        await asyncio.wait({load}, timeout=EVERY_S)
        minute += 1
        cuts = statistics.quantiles(run.seconds, n=100) if len(run.seconds) > 2 else [0.0] * 99
        states = " | ".join(f"{mib:.0f}, {files}" for mib, files in map(held, names.values()))
        lines.append(
            f"| {minute} | {len(run.seconds)} | {cuts[49] * 1e3:.0f} | {cuts[98] * 1e3:.0f} | {states} | "
            f"{json.dumps(run.statuses)} |"
        )
        print(lines[-1], flush=True)
        run.seconds.clear()
        run.statuses.clear()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="name=BUNDLE")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers that were started are ended
    random.seed(0)
    models = [(n, bundle.read(p, check=False).tasks) for n, _, p in (b.partition("=") for b in given.bundles)]
    with Server(*given.bundles, "--variant", given.variant, "--log-level", "WARNING") as server:
        lines = asyncio.run(soak(server, models, given.minutes, given.share))
    if given.out:
        facts = ", ".join(machine.facts().values())
        given.out.write_text("# A soak\n\n" + "\n".join(lines) + f"\n\n{facts}\n")


if __name__ == "__main__":
    main()
