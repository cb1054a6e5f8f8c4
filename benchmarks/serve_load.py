"""Many clients at once: throughput and time to the first token, beside transformers and llama.cpp's own server.

    python benchmarks/serve_load.py generate BUNDLE CHECKPOINT --variant int4-g32 --backend openvino
        --texts FILE --field NAME --llama-server BINARY --gguf FILE [--clients 16 64] [--out FILE]
    python benchmarks/serve_load.py encode BUNDLE [--requests 1000] [--clients 64] [--out FILE]

generate: each client sends one request after another, until a trace of fixed seed is through: prompts of 16 to 384
tokens, answers of 8 to 128, end tokens ignored, so that everybody has the same work. Prompts are pieces of the texts of
a JSON lines file; without one, tokens drawn at random, whose answers repeat themselves, which speculation likes. A
contender is a server in its own process, all in one run, in turns. All get token ids, and stream. transformers'
generate answers one request after another behind FastAPI; llama.cpp's llama-server batches continuously, with a slot
for each client, on a GGUF file of the same model. The client writes HTTP on plain sockets, so that its own work hardly
counts.

encode: embeddings of texts of 1 to 400 words in random order: one request after another by one client, then by many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import serve_process  # noqa: E402
from medcompile.bench import machine  # noqa: E402

PROMPT, ANSWER = (16, 384), (8, 128)
CONTEXT = 640
"""Tokens of a slot: the longest prompt and answer, and a little more."""
WORDS = ("patient", "denies", "chest", "pain", "fever", "kidney", "injury", "metformin", "started", "daily", "ward")


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    tokens: int


@dataclass(frozen=True)
class Seen:
    """seconds: of the whole run. first_s: until each request's first token. pieces: events with something in them."""

    seconds: float
    tokens: int
    first_s: list[float]
    failed: int


def trace(requests: int, tokens: Sequence[int]) -> list[Job]:
    """Prompts are stretches of these tokens, each from a place of its own."""
    random = np.random.default_rng(0)
    jobs = []
    for _ in range(requests):
        length, answer = (int(random.integers(low, high + 1)) for low, high in (PROMPT, ANSWER))
        at = int(random.integers(0, len(tokens) - length))
        jobs.append(Job(list(tokens[at : at + length]), answer))
    return jobs


def tokens_of(given: argparse.Namespace, vocabulary: int = 49_000) -> list[int]:
    if given.texts is None:
        return [int(i) for i in np.random.default_rng(1).integers(64, vocabulary, 1 << 16)]
    tokenizer = tokenizers.Tokenizer.from_file(str(given.bundle / "assets" / "tokenizer.json"))
    tokenizer.no_truncation()
    lines = given.texts.read_text(encoding="utf-8").splitlines()
    return [i for line in lines for i in tokenizer.encode(json.loads(line)[given.field]).ids]


# ---- a client


async def ask(host: str, port: int, path: str, body: dict[str, Any]) -> tuple[int, float, bytes]:
    """Status, seconds until the first event (or byte) of the body, and the body."""
    data = json.dumps(body).encode()
    began_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 22)
    try:
        writer.write(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        status, pieces, first_s = int(head.split()[1]), [], 0.0
        while piece := await reader.read(1 << 16):
            first_s = first_s or time.perf_counter() - began_s
            pieces.append(piece)
        return status, first_s, b"".join(pieces)
    finally:
        writer.close()


async def load(url: str, path: str, bodies: Sequence[dict[str, Any]], clients: int, tokens: Sequence[int]) -> Seen:
    host, _, port = url.removeprefix("http://").partition(":")
    waiting = list(range(len(bodies)))[::-1]
    first_s: list[float] = []
    done = failed = 0

    async def client() -> None:
        nonlocal done, failed
        while waiting:
            index = waiting.pop()
            status, first, answer = await ask(host, int(port), path, bodies[index])
            good = status == 200 and b'"error"' not in answer
            failed += not good
            done += tokens[index] if good else 0
            first_s.append(first)

    began_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Seen(time.perf_counter() - began_s, done, first_s, failed)


# ---- generation


def contenders(given: argparse.Namespace, clients: int) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """Name, server, and whether it is asked for all of the trace (transformers takes a part: it is slow).

    One after another is as fast for many clients as for few, so transformers competes with the fewest alone.
    """
    ours = [f"m={given.bundle}", "--queue", 4096, "--threads", given.threads]
    ours += ["--kv-blocks", clients * (CONTEXT // 32)]
    for option in ("variant", "backend"):
        if getattr(given, option):
            ours += [f"--{option}", getattr(given, option)]
    yield "medcompile serve", lambda: serve_process.running(*ours), True
    if given.llama_server:
        server = lambda: serve_process.llama_server(  # noqa: E731
            given.llama_server, given.gguf, clients, CONTEXT, given.threads
        )
        yield "llama.cpp, llama-server", server, True
    if clients == min(given.clients):
        yield "transformers, one by one", lambda: serve_process.transformers_server(given.checkpoint), False


def generate(given: argparse.Namespace) -> str:
    lines = [
        "| clients | server | requests | tokens/s | TTFT p50 s | TTFT p99 s | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    tokens = tokens_of(given)
    for clients in given.clients:
        jobs = trace(given.requests or 4 * clients, tokens)
        for name, server, whole in contenders(given, clients):
            took = jobs if whole else jobs[: max(clients, len(jobs) // 8)]
            bodies = [
                {
                    "model": "m",
                    "prompt": job.prompt,
                    "max_tokens": job.tokens,
                    "temperature": 0,
                    "stream": True,
                    "ignore_eos": True,
                }
                for job in took
            ]
            with server() as url:
                asyncio.run(load(url, "/v1/completions", bodies[:2], 1, [0] * 2))
                seen = asyncio.run(load(url, "/v1/completions", bodies, clients, [job.tokens for job in took]))
            cuts = statistics.quantiles(seen.first_s, n=100)
            lines.append(
                f"| {clients} | {name} | {len(took)} | {seen.tokens / seen.seconds:.1f} | {cuts[49]:.2f} | "
                f"{cuts[98]:.2f} | {seen.failed} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


# ---- encoding


@contextmanager
def encoder(given: argparse.Namespace) -> Iterator[str]:
    running: AbstractContextManager[str] = serve_process.running(
        f"m={given.bundle}", "--queue", 4096, "--threads", given.threads
    )
    with running as url:
        yield url


def encode(given: argparse.Namespace) -> str:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, int(random.integers(1, 400)))) for _ in range(given.requests or 1000)]
    bodies = [{"model": "m", "input": text, "encoding_format": "base64"} for text in texts]
    lines = ["| clients | requests/s | p50 ms | p99 ms | failed |", "|---|---|---|---|---|"]
    with encoder(given) as url:
        asyncio.run(load(url, "/v1/embeddings", bodies[:50], 8, [1] * 50))
        for clients in (1, *given.clients):
            seen = asyncio.run(load(url, "/v1/embeddings", bodies, clients, [1] * len(bodies)))
            cuts = statistics.quantiles(seen.first_s, n=100)
            lines.append(
                f"| {clients} | {seen.tokens / seen.seconds:.1f} | {cuts[49] * 1e3:.1f} | {cuts[98] * 1e3:.1f} | "
                f"{seen.failed} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    making, encoding = steps.add_parser("generate"), steps.add_parser("encode")
    for step in (making, encoding):
        step.add_argument("bundle", type=Path)
        step.add_argument("--requests", type=int)
        step.add_argument("--threads", type=int, default=len(machine.cpus()))
        step.add_argument("--out", type=Path)
    making.add_argument("checkpoint", type=Path)
    making.add_argument("--clients", type=int, nargs="+", default=[16, 64])
    making.add_argument("--texts", type=Path)
    making.add_argument("--field", default="text")
    making.add_argument("--variant")
    making.add_argument("--backend")
    making.add_argument("--llama-server", type=Path)
    making.add_argument("--gguf", type=Path)
    encoding.add_argument("--clients", type=int, nargs="+", default=[16, 64])
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers that were started are ended
    told = generate(given) if given.step == "generate" else encode(given)
    facts = ", ".join(f"{key}: {value}" for key, value in machine.facts().items())
    if given.out:
        given.out.write_text(f"# {given.step} under load\n\n{told}\n\n{facts}\n")


if __name__ == "__main__":
    main()
