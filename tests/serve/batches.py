"""Batches answered by a made-up model, in this process or in a child that dies where it is told to.

python -m tests.serve.batches IN OUT [--pause SECONDS] [--die-at N]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from medcompile.serve import batch, spool
from medcompile.serve.batch import Ask, Batch, Job, Progress
from medcompile.serve.batch_lines import Answered, Request, parsed
from medcompile.serve.files import JsonLines
from medcompile.serve.spool import Spool

URL = "/v1/echo"


def line(custom_id: str, text: str) -> bytes:
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": {"input": text}}) + b"\n"


def write(path: Path, count: int, seed: int = 0) -> Path:
    """Requests of very different lengths, with blank lines and a line of garbage among them."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        for i in range(count):
            if chance.random() < 0.02:
                file.write(b"\n")
            file.write(line(f"note-{i}", "é" * chance.randint(0, 400)) if i % 97 != 41 else b'{"custom_id": \n')
    return path


def answer_to(request: Request) -> bytes:
    return orjson.dumps({"echo": hashlib.sha256(orjson.dumps(request.body)).hexdigest()})


async def echo(request: Request, _: str) -> Answered:
    await asyncio.sleep(0)
    return Answered(200, answer_to(request))


async def no_wait(_: Request) -> None: ...


def job(path: Path, ask: Ask = echo, ready: Callable[[Request], Awaitable[None]] = no_wait) -> Job:
    return Job(JsonLines(path), lambda record: parsed(record, [URL]), ask, ready)


def about(path: Path) -> dict[str, str]:
    return {"input": JsonLines(path).identity()}


def run(
    path: Path,
    out: Path,
    ask: Ask = echo,
    *,
    tell: Callable[[Progress], None] = lambda _: None,
    in_flight: int = 64,
    restart: bool = False,
    **more: Any,
) -> Progress | None:
    """What the command does, but for the model. None where an earlier run had done all."""
    with Spool(out, about(path), restart=restart) as its:
        if its.finished:
            its.clear()
            return None
        made = asyncio.run(Batch(job(path, ask, **more), its, tell, in_flight).run())
        its.finish()
        return made


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in out.read_bytes().splitlines()]


def check(path: Path, out: Path) -> None:
    """Every record of path has one line in out, in its place, with the right answer; and no other file is left."""
    found = lines(out)
    wanted = [parsed(record, [URL]) for record in JsonLines(path).records(spool.Mark().place)]
    assert [answer["custom_id"] for answer in found] == [request.custom_id for request in wanted]
    for answer, request in zip(found, wanted, strict=True):
        if isinstance(request, Request):
            assert orjson.dumps(answer["response"]["body"]) == answer_to(request)
        else:
            assert answer["error"]["code"] == request.code and answer["response"] is None
    assert len({answer["id"] for answer in found}) == len(found)
    assert sorted(p.name for p in out.parent.glob(f"{out.name}*")) == [out.name]


def rotten(data: bytes, places: Iterable[int]) -> bytes:
    """With these bits, counted from the first, the other way round."""
    broken = bytearray(data)
    for bit in places:
        broken[bit // 8] ^= 1 << bit % 8
    return bytes(broken)


def _die_at(number: int) -> None:
    """kill -9 this process just before it does something lasting for the so-many-th time."""
    counted = itertools.count(1)

    def mortal(work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            if next(counted) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **more)

        return called

    os.fsync = mortal(os.fsync)
    Path.replace = mortal(Path.replace)  # type: ignore[method-assign]
    Path.unlink = mortal(Path.unlink)  # type: ignore[method-assign]
    Path.touch = mortal(Path.touch)  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--die-at", type=int, default=0)
    told = parser.parse_args()
    chance = random.Random()

    async def slow(request: Request, request_id: str) -> Answered:
        await asyncio.sleep(told.pause * chance.random())
        return await echo(request, request_id)

    batch.COMMIT_S = 0.05
    if told.die_at:
        _die_at(told.die_at)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    run(told.path, told.out, slow)


if __name__ == "__main__":
    main()
