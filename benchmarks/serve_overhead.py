"""What HTTP costs: p50 of one embedding request over the real server, less that of the bare session call.

    python benchmarks/serve_overhead.py engines/quickstart [--requests 500] [--out benchmarks/results/serve_overhead.md]

Bare calls and requests take turns, one of each, so that whatever the machine does meets both alike. The server is the
command, in its own process, with its worker in another; the client is one keep-alive connection of http.client, so that
no client library's time is measured. A second row asks through the official openai client.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import medcompile  # noqa: E402
from benchmarks.serve_process import running  # noqa: E402
from medcompile.bench import machine  # noqa: E402

TEXT = "Metformin was stopped for acute kidney injury."


def timed_s(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def measure(bundle: Path, requests: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each way of asking."""
    import openai

    with medcompile.load(bundle, threads=threads) as session, running(f"m={bundle}", "--threads", threads) as url:
        host = url.removeprefix("http://")
        connection = http.client.HTTPConnection(host)
        body = json.dumps({"model": "m", "input": TEXT})
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

        def ask() -> None:
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200 or not answer.read():
                raise RuntimeError(f"status {answer.status}")

        ways: dict[str, Callable[[], Any]] = {
            "bare session.embed": lambda: session.embed(TEXT),
            "HTTP, one keep-alive connection": ask,
            "HTTP, openai client": lambda: client.embeddings.create(model="m", input=TEXT),
        }
        for way in ways.values():
            for _ in range(30):
                way()
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(requests):
            for name, way in ways.items():
                found[name].append(timed_s(way))
    return found


def table(found: dict[str, list[float]]) -> str:
    bare = statistics.median(next(iter(found.values())))
    lines = ["| | p50 ms | p90 ms | p99 ms | p50 less the bare call's, ms |", "|---|---|---|---|---|"]
    for name, seconds in found.items():
        cuts = statistics.quantiles(seconds, n=100)
        p50 = statistics.median(seconds)
        lines.append(
            f"| {name} | {p50 * 1e3:.2f} | {cuts[89] * 1e3:.2f} | {cuts[98] * 1e3:.2f} | {(p50 - bare) * 1e3:+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers that were started are ended
    found = measure(given.bundle, given.requests, given.threads)
    facts = ", ".join(machine.facts().values())
    told = f"{table(found)}\n\n{given.requests} of each in turn, {given.threads} thread(s) of the model; {facts}\n"
    print(told)
    if given.out:
        given.out.write_text(f"# What HTTP costs\n\n{told}")


if __name__ == "__main__":
    main()
