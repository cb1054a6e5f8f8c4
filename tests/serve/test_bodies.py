"""Bodies: too large, too slow, too many at once; and answers that nobody takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcompile.serve.asgi import Message, Receive, Scope, Send
from medcompile.serve.bodies import Bodies, BodyLimits, ClientStalled

pytestmark = pytest.mark.anyio


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    assert message["more_body"] is False
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def pieces_of(body: Sequence[bytes], *, pause_s: float = 0.0, leaves: bool = False) -> Receive:
    """A client that sends these pieces one by one, and then waits or leaves."""

    waiting = list(enumerate(body))

    async def receive() -> Message:
        await asyncio.sleep(pause_s)
        if not waiting:
            return {"type": "http.disconnect"}
        number, piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": leaves or number < len(body) - 1}

    return receive


async def asked(
    bodies: Bodies, body: Sequence[bytes], *, length: str | None = None, pause_s: float = 0.0, leaves: bool = False
) -> tuple[int, bytes]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length.encode())]
    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    await bodies(scope, pieces_of(body, pause_s=pause_s, leaves=leaves), send)
    if not sent:
        return 0, b""
    return int(sent[0]["status"]), b"".join(m.get("body", b"") for m in sent[1:])


@given(pieces=st.lists(st.binary(max_size=40), min_size=1, max_size=8), limit=st.integers(0, 120))
def test_a_body_comes_through_whole_or_not_at_all_however_it_is_cut(pieces: list[bytes], limit: int) -> None:
    bodies = Bodies(echo, BodyLimits(bytes=limit))
    status, answer = asyncio.run(asked(bodies, pieces))
    whole = b"".join(pieces)
    assert (status, answer) == (200, whole) if len(whole) <= limit else status == 413
    assert bodies.held_bytes == 0


async def test_a_content_length_above_the_limit_is_refused_before_the_body_and_a_lie_as_it_comes() -> None:
    bodies = Bodies(echo, BodyLimits(bytes=10))
    assert (await asked(bodies, [b"x"], length="11"))[0] == 413
    assert (await asked(bodies, [b"x" * 6, b"x" * 6], length="5"))[0] == 413
    assert (await asked(bodies, [b"x" * 10], length="10"))[0] == 200
    for odd in ("-1", "abc", "", "1e3", "99999999999999999999999"):
        assert (await asked(bodies, [b"x"], length=odd))[0] == (413 if odd.isdigit() else 200)


async def test_a_body_that_trickles_in_is_cut_off_at_its_time() -> None:
    bodies = Bodies(echo, BodyLimits(seconds=0.1))
    status, answer = await asked(bodies, [b"x"] * 1000, pause_s=0.02)
    assert status == 408 and b"body_too_slow" in answer and bodies.held_bytes == 0


async def test_a_client_that_leaves_within_its_body_gets_no_answer_and_the_app_is_not_asked() -> None:
    async def never(*_: Any) -> None:
        raise AssertionError

    bodies = Bodies(never)
    assert await asked(bodies, [b"x" * 5], leaves=True) == (0, b"")
    assert bodies.held_bytes == 0


async def test_all_bodies_together_are_bounded_and_room_comes_back() -> None:
    inside, leave = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        inside.set()
        await leave.wait()
        await echo(scope, receive, send)

    bodies = Bodies(slow, BodyLimits(held_bytes=100))
    first = asyncio.create_task(asked(bodies, [b"x" * 80]))
    await inside.wait()
    assert (await asked(bodies, [b"x" * 30]))[0] == 503 and bodies.held_bytes == 80
    leave.set()
    assert (await first)[0] == 200 and bodies.held_bytes == 0
    assert (await asked(bodies, [b"x" * 100]))[0] == 200


async def test_an_app_that_fails_gives_its_room_back() -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError

    bodies = Bodies(broken)
    with pytest.raises(RuntimeError):
        await asked(bodies, [b"x" * 80])
    assert bodies.held_bytes == 0


async def test_an_answer_that_is_not_taken_ends_what_makes_it() -> None:
    ended = False

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal ended
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended = True

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(ClientStalled):
        await Bodies(stream, BodyLimits(send_s=0.05))(scope, pieces_of([b""]), send)
    assert ended
