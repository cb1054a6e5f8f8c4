"""What the server makes of clients that mean harm, or die: with figures, as markdown.

PYTHONPATH=. python benchmarks/serve_faults.py TEXT_BUNDLE DECODER_BUNDLE > benchmarks/results/serve_faults.md

Every scene has a well-behaved client beside it, who asks for one embedding after another; how that one fares is told.
All of it stays on this machine's own address, and every loop is bounded in number and time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import resource
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from medcompile.serve.chain import files_of, verify
from tests.serve.servers import Server, wait_for

NAME = "Zdenka Vondrackova"
TEXT, LLM = "text", "llm"
EMBEDDING = {"model": TEXT, "input": f"{NAME} was given metformin."}
AT_ONCE = 16
STORY = {"model": LLM, "prompt": f"{NAME} was", "max_tokens": 400, "ignore_eos": True}


@dataclass
class Probe:
    """A client who asks for embeddings, one after another, while something else goes on."""

    server: Server
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[object] = field(default_factory=Counter)

    def __enter__(self) -> Probe:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(0.02):
            began_s = time.perf_counter()
            try:
                # A connection of its own each time, as a newcomer has.
                told = httpx.post(f"{self.server.url}/v1/embeddings", json=EMBEDDING, timeout=20).status_code
            except httpx.HTTPError as error:
                told = type(error).__name__
            self.seconds.append(time.perf_counter() - began_s)
            self.statuses[told] += 1

    def told(self) -> str:
        ms = sorted(1000 * s for s in self.seconds)
        good = self.statuses[200]
        p99 = ms[min(len(ms) - 1, int(len(ms) * 0.99))]
        return f"{good} of {len(ms)} answered; {statistics.median(ms):.1f} ms p50, {p99:.1f} ms p99"


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def established(server: Server) -> int:
    """Connections that the server holds open."""
    sockets = 0
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets += str(link.readlink()).startswith("socket:")
    return sockets


# ---- scenes; each gives rows of (what, figure)

Rows = Iterator[tuple[str, str]]


def quiet(server: Server) -> Rows:
    with Probe(server) as probe:
        time.sleep(5)
    yield "the client beside it, with nobody else", probe.told()


def silent(server: Server, count: int) -> Rows:
    """Connections that send nothing."""
    pid, host, port = server.process.pid, *_address(server)
    before, files = resident_mib(pid), open_files(pid)

    async def flood() -> tuple[int, int, float]:
        writers, refused = [], 0
        for _ in range(count // 100):
            opened = await asyncio.gather(
                *(asyncio.open_connection(host, port) for _ in range(100)), return_exceptions=True
            )
            writers += [one[1] for one in opened if not isinstance(one, BaseException)]
            refused += sum(isinstance(one, BaseException) for one in opened)
        most, began_s = established(server), time.monotonic()
        while established(server) > files + 8 and time.monotonic() - began_s < 40:
            await asyncio.sleep(0.25)
        waited_s = time.monotonic() - began_s
        for writer in writers:
            writer.close()
        return most, refused, waited_s

    with Probe(server) as probe:
        most, refused, waited_s = asyncio.run(flood())
        peak = resident_mib(pid)
    yield f"{count:,} connections that send nothing", f"{refused} not accepted; {most:,} held at once by the server"
    yield "all of them closed by the server", f"{waited_s:.1f} s after the last was opened"
    yield "resident memory before and after", f"{before:.0f} MiB, {peak:.0f} MiB"
    yield "open files before and after", f"{files}, {open_files(pid)}"
    yield "the client beside it", probe.told()


def trickle(server: Server, clients: int = 100) -> Rows:
    """Clients that send one byte a second: of a head, or of a body."""
    host, port = _address(server)
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 500
    whole = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n"

    async def one(begin: bytes, rest: bytes) -> tuple[float, str]:
        reader, writer = await asyncio.open_connection(host, port)
        began_s = time.monotonic()
        writer.write(begin)
        for byte in rest:
            if reader.at_eof() or time.monotonic() - began_s > 60:
                break
            with contextlib.suppress(ConnectionError):
                writer.write(bytes([byte]))
                await writer.drain()
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(1.0):
                    said = await reader.read(2000)
                    return time.monotonic() - began_s, said[:12].decode("latin-1") or "closed"
        return time.monotonic() - began_s, "closed"

    async def both() -> list[list[tuple[float, str]]]:
        heads = asyncio.gather(*(one(b"", head) for _ in range(clients)))
        bodies = asyncio.gather(*(one(whole, b"x" * 500) for _ in range(clients)))
        return [await heads, await bodies]

    with Probe(server) as probe:
        heads, bodies = asyncio.run(both())
    for what, told in (("a head", heads), ("a body", bodies)):
        ends = Counter(end for _, end in told)
        spans = sorted(seconds for seconds, _ in told)
        yield (
            f"{clients} clients that send one byte a second of {what}",
            f"ended after {spans[0]:.1f} to {spans[-1]:.1f} s: " + ", ".join(f"{n} x {end}" for end, n in ends.items()),
        )
    yield "the client beside it", probe.told()


def deaf(server: Server, clients: int = 20) -> Rows:
    """Clients that read one byte a second of a large answer."""
    pid, host, port = server.process.pid, *_address(server)
    body = json.dumps({"model": TEXT, "input": ["x"] * 2000}).encode()
    request = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    size = len(server.http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"}).content)
    request *= AT_ONCE  # one answer would fit into the system's own buffers, and wait there at nobody's cost

    def one() -> tuple[float, int]:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the kernel must not read on for it
            connection.connect((host, port))
            connection.sendall(request)
            began_s, got = time.monotonic(), 0
            while time.monotonic() - began_s < 80:
                try:
                    piece = connection.recv(1)
                except ConnectionError:
                    break
                if not piece:
                    break
                got += len(piece)
                time.sleep(1.0)
            return time.monotonic() - began_s, got

    before = resident_mib(pid)
    held: list[float] = []
    with (
        Probe(server) as probe,
        _sampled(lambda: held.append(resident_mib(pid))),
        ThreadPoolExecutor(clients) as pool,
    ):
        told = [future.result() for future in [pool.submit(one) for _ in range(clients)]]
    spans, most = [seconds for seconds, _ in told], max(got for _, got in told)
    yield (
        f"{clients} clients that read one byte a second of {AT_ONCE} answers of {size / 2**20:.1f} MiB",
        f"cut off after {min(spans):.0f} to {max(spans):.0f} s; {most} bytes read of each",
    )
    yield "resident memory before, at most, and after", f"{before:.0f}, {max(held):.0f}, {resident_mib(pid):.0f} MiB"
    yield "the client beside it", probe.told()


def killed(server: Server, clients: int = 32) -> Rows:
    """A model's worker is killed while all of these wait for it; the other model goes on."""
    codes: Counter[int] = Counter()
    with Probe(server) as probe, ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(server.post, "/v1/completions", STORY) for _ in range(clients)]
        wait_for(lambda: server.metric("medcompile_requests_running", model=LLM) >= 4, 30)
        died_s = time.monotonic()
        os.kill(server.workers()[LLM], signal.SIGKILL)
        codes.update(future.result().status_code for future in asked)
        told_s = time.monotonic() - died_s
        wait_for(lambda: server.http.get("/health/ready").status_code == 200, 120)
        back_s = time.monotonic() - died_s
    yield (
        f"a worker killed under {clients} requests",
        ", ".join(f"{n} x {code}" for code, n in codes.items()) + f" within {told_s:.2f} s",
    )
    yield "that model ready again", f"after {back_s:.1f} s"
    yield "the client of the other model", probe.told()


def bits(server: Server, audit: Path, tries: int = 3000) -> Rows:
    """Bits of the audit log changed, one at a time."""
    whole = verify(audit)
    source = files_of(audit)[-1]
    good = source.read_bytes()
    chance, found = random.Random(0), 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / source.name
        for _ in range(tries):
            at = chance.randrange(len(good) * 8)
            bad = bytearray(good)
            bad[at // 8] ^= 1 << at % 8
            copy.write_bytes(bad)
            found += not verify(copy).whole
    yield (
        f"the audit log of this run: {whole.records:,} records",
        "whole" if whole.whole else f"BROKEN: {whole.problem}",
    )
    yield f"one bit of it changed, {tries:,} times at random", f"found {found:,} times"


def planted(server: Server, audit: Path) -> Rows:
    """The name that stood in every request of this run."""
    words = NAME.split()
    places = {
        "the log": "".join(server.said),
        "metrics": server.http.get("/metrics").text,
        "the audit log": "".join(file.read_text() for file in files_of(audit)),
    }
    for place, text in places.items():
        hits = sum(text.count(word) for word in words)
        yield f"a patient's name in {place} ({len(text):,} characters)", f"{hits} times"


# ---- the whole


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("text")
    asked.add_argument("decoder")
    asked.add_argument("--connections", type=int, default=10_000)
    asked.add_argument("--threads", type=int, default=1)
    wanted = asked.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as scratch:
        audit = Path(scratch) / "audit"
        bundles = (f"{TEXT}={wanted.text}", f"{LLM}={wanted.decoder}")
        options = ("--threads", wanted.threads, "--audit-log", audit, "--cache", "memory", "--log-level", "DEBUG")
        with Server(*bundles, *options) as server:
            scenes: list[tuple[str, Callable[[], Rows]]] = [
                ("Nobody else", lambda: quiet(server)),
                ("Silence", lambda: silent(server, wanted.connections)),
                ("One byte a second, sent", lambda: trickle(server)),
                ("One byte a second, read", lambda: deaf(server)),
                ("A worker dies", lambda: killed(server)),
                ("The audit log", lambda: bits(server, audit)),
                ("A patient's name", lambda: planted(server, audit)),
            ]
            print(f"# Faults\n\n{_processor()}, {os.cpu_count()} cores, other work beside it;")
            print(f"Python {platform.python_version()}; printed by `benchmarks/serve_faults.py` in one run.\n")
            for title, scene in scenes:
                print(f"## {title}\n\n| what | what came of it |\n|---|---|")
                for what, figure in scene():
                    print(f"| {what} | {figure} |", flush=True)
                print()


def _processor() -> str:
    told = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    return told.strip(" \t:") or platform.machine()


def _address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


@contextlib.contextmanager
def _sampled(take: Callable[[], None]) -> Iterator[None]:
    stop = threading.Event()

    def often() -> None:
        while not stop.wait(0.2):
            take()

    thread = threading.Thread(target=often)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
