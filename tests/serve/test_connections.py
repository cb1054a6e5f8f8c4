"""Connections, on a real socket: those that say nothing, too much, too slowly, or never read; all others are served."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn

from medcompile.serve.asgi import Receive, Scope, Send
from medcompile.serve.connections import ConnectionLimits, Door

pytestmark = pytest.mark.anyio

BIG = 64 << 20
GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/refused":  # without reading the body
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        return
    while (await receive()).get("more_body"):
        pass
    size = BIG if scope["path"] == "/big" else 2
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(size).encode())]})
    await send({"type": "http.response.body", "body": b"ok" * (size // 2)})


@contextlib.asynccontextmanager
async def serving(limits: ConnectionLimits) -> AsyncIterator[tuple[Door, int]]:
    door = Door(limits)
    config = uvicorn.Config(app, port=0, http=door.protocol, log_level="error", lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield door, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await running


async def closed_within(reader: asyncio.StreamReader, seconds: float) -> bytes:
    """What still comes until the server closes. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


async def test_a_connection_that_says_nothing_is_closed_and_one_that_asks_is_not() -> None:
    async with serving(ConnectionLimits(head_s=0.5)) as (door, port):
        silent, _w1 = await asyncio.open_connection("127.0.0.1", port)
        asks, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        assert (await asks.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert await closed_within(silent, 4) == b""
        assert len(door) == 1
        writer.write(GET)  # idle for longer than a head may take, and still good
        assert (await asks.readuntil(b"ok")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("before", [b"", GET])
async def test_a_head_that_trickles_in_is_cut_off_on_a_used_connection_too(before: bytes) -> None:
    async with serving(ConnectionLimits(head_s=0.5)) as (door, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if before:
            writer.write(before)
            await reader.readuntil(b"ok")
        began_s = time.perf_counter()
        for byte in GET * 10:
            writer.write(bytes([byte]))
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0.1)
            if reader.at_eof() or len(door) == 0:
                break
        assert time.perf_counter() - began_s < 3 and len(door) == 0


async def test_a_head_that_never_ends_is_refused_at_its_limit() -> None:
    async with serving(ConnectionLimits(head_bytes=20_000)) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"y" * 90) for n in range(300)))
        assert b" 431 " in await closed_within(reader, 3)


async def test_the_longest_silent_make_room_so_that_who_asks_is_served_during_a_flood() -> None:
    async with serving(ConnectionLimits(most=50, head_s=60)) as (door, port):
        flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
        assert len(door) <= 50 and door.turned_away >= 150
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(20):
                assert (await client.get("/")).status_code == 200
        for _, writer in flood:
            writer.close()


async def test_where_all_are_at_work_a_new_connection_is_told_to_come_again() -> None:
    async with serving(ConnectionLimits(most=2)) as (door, port):
        two = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in two:
            writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n")
            await writer.drain()
        while len(door.busy) < 2:
            await asyncio.sleep(0.01)
        third, _ = await asyncio.open_connection("127.0.0.1", port)
        assert b" 503 " in await closed_within(third, 3)


async def test_a_client_that_does_not_read_is_cut_off_and_one_that_reads_slowly_is_not() -> None:
    async with serving(ConnectionLimits(stalled_s=1.5)) as (door, port):
        deaf, deaf_writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        deaf_writer.write(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
        slow, slow_writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        slow_writer.write(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
        got = 0
        while piece := await slow.read(256 << 10):
            got += len(piece)
            if got > BIG:
                break
            await asyncio.sleep(0.01)  # in some four seconds
        assert got > BIG
        until = time.monotonic() + 6
        while len(door) > 1 and time.monotonic() < until:
            await asyncio.sleep(0.05)
        assert len(door) == 1
        del deaf


async def test_a_body_whose_request_was_refused_may_come_to_its_end_and_the_connection_goes_on() -> None:
    async with serving(ConnectionLimits(head_s=1.0, head_bytes=10_000)) as (door, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /refused HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        assert b" 401 " in await reader.readuntil(b"\r\n\r\n")
        for _ in range(20):
            writer.write(b"x" * 10_000)
            await writer.drain()
        writer.write(GET)
        assert b" 200 " in await reader.readuntil(b"ok")
        writer.write(b"POST /refused HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        assert await closed_within(reader, 4) == b"" and len(door) == 0  # a rest that never comes


async def test_nothing_is_kept_of_connections_that_are_gone() -> None:
    async with serving(ConnectionLimits()) as (door, port):
        for number in range(200):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if number % 2:
                writer.write(GET)
                await reader.readuntil(b"ok")
            writer.close()
        until = time.monotonic() + 5
        while len(door) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        assert (len(door.strangers), len(door.idle), len(door.busy)) == (0, 0, 0)
