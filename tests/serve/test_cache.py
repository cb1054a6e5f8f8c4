"""The response cache: it never gives another question's answer, never one that is over, and keeps nothing readable."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from medcompile.errors import UsageError
from medcompile.serve.cache import Question, ResponseCache, read_secret
from medcompile.serve.stores import MemoryStore, RedisStore, StoreFault, store_at

pytestmark = pytest.mark.anyio

ASKED = Question("d" * 64, "int8/onnxruntime-cpu", "/v1/entities", {"model": "m", "input": "Ann Planted, 61"}, "ward-3")
ANSWER = b'{"entities":["Ann Planted"]}'
SECRET = bytes(range(32))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Shelf:
    """A store that can be looked into and tampered with, and that ignores times."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    async def get(self, key: bytes) -> bytes | None:
        return self.held.get(key)

    async def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        self.held[key] = value

    async def close(self) -> None: ...


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
questions = st.builds(
    Question,
    st.sampled_from(["a", "ab", ""]),
    st.sampled_from(["b", "", "ab"]),
    st.sampled_from(["/v1/x", "/v1/y"]),
    st.dictionaries(st.sampled_from(["input", "model", "top_k"]), json_values, max_size=3),
    st.sampled_from(["", "a", "b", "all"]),
)


def _typed(value: Any) -> Any:
    """Equal only where the JSON is: 1, 1.0 and true are not the same question."""
    if isinstance(value, dict):
        return ("d", sorted((k, _typed(v)) for k, v in value.items()).__repr__())
    if isinstance(value, list):
        return ("l", [_typed(v) for v in value])
    return (type(value).__name__, repr(value))


@given(one=questions, other=questions)
def test_only_equal_questions_share_a_key(one: Question, other: Question) -> None:
    cache = ResponseCache(Shelf(), secret=SECRET)
    same = _typed([*vars(one).values()]) == _typed([*vars(other).values()])
    assert (cache.key(one) == cache.key(other)) == same


@pytest.mark.parametrize(
    "other",
    [
        replace(ASKED, digest="e" * 64),
        replace(ASKED, artifact="fp32/onnxruntime-cpu"),
        replace(ASKED, url="/v1/classify"),
        replace(ASKED, body={"model": "m", "input": "Ann Planted, 62"}),
        replace(ASKED, body={"model": "m", "input": ["Ann Planted, 61"]}),
        replace(ASKED, caller="ward-4"),
    ],
)
def test_another_bundle_variant_route_body_or_caller_is_another_question(other: Question) -> None:
    cache = ResponseCache(Shelf())
    assert cache.key(ASKED) != cache.key(other)


def test_what_changes_no_answer_changes_no_key_and_callers_share_only_where_told() -> None:
    cache, shared = ResponseCache(Shelf(), secret=SECRET), ResponseCache(Shelf(), secret=SECRET, apart=False)
    urgent = replace(ASKED, body={"priority": "emergency", "user": "u", "input": "Ann Planted, 61", "model": "m"})
    assert cache.key(ASKED) == cache.key(urgent)
    assert shared.key(ASKED) == shared.key(replace(ASKED, caller="ward-4"))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_store_that_swaps_alters_or_cuts_values_gets_none_of_them_taken_for_an_answer(data: st.DataObject) -> None:
    async def check() -> None:
        shelf = Shelf()
        cache = ResponseCache(shelf, secret=SECRET)
        keys = [cache.key(replace(ASKED, body={"input": str(n)})) for n in range(4)]
        for n, key in enumerate(keys):
            await cache.put(key, b"answer %d" % n)
        good = dict(shelf.held)
        for key in keys:
            value = bytearray(good[data.draw(st.sampled_from(keys))])
            how = data.draw(st.sampled_from(["as is", "bit", "cut", "longer", "empty"]))
            if how == "bit":
                at = data.draw(st.integers(0, len(value) * 8 - 1))
                value[at // 8] ^= 1 << at % 8
            elif how == "cut":
                value = value[: data.draw(st.integers(0, len(value) - 1))]
            elif how == "longer":
                value += b"x"
            elif how == "empty":
                value = bytearray()
            shelf.held[key] = bytes(value)
        for n, key in enumerate(keys):
            expected = b"answer %d" % n if shelf.held[key] == good[key] else None
            assert await cache.get(key) == expected

    asyncio.run(check())


async def test_nothing_readable_is_in_the_store_and_another_secret_opens_nothing() -> None:
    shelf = Shelf()
    cache = ResponseCache(shelf, secret=SECRET)
    key = cache.key(ASKED)
    await cache.put(key, ANSWER)
    everything = b"".join(k + v for k, v in shelf.held.items())
    assert b"Ann" not in everything and b"Planted" not in everything and b"entities" not in everything
    assert await cache.get(key) == ANSWER
    assert await ResponseCache(shelf).get(key) is None
    await cache.put(key, ANSWER)
    assert everything != b"".join(k + v for k, v in shelf.held.items())  # a nonce is never used twice


async def test_an_answer_is_over_at_its_time_even_where_the_store_keeps_it() -> None:
    clock, shelf = Clock(), Shelf()
    cache = ResponseCache(shelf, ttl_s=60, clock=clock)
    key = cache.key(ASKED)
    await cache.put(key, ANSWER)
    clock.now_s += 59.9
    assert await cache.get(key) == ANSWER
    clock.now_s += 0.2
    assert await cache.get(key) is None and shelf.held
    assert (cache.counts.hits, cache.counts.misses, cache.counts.faults) == (1, 1, 0)


def test_generated_answers_are_kept_only_where_asked_for_and_streams_never() -> None:
    usual, asked = ResponseCache(Shelf()), ResponseCache(Shelf(), generations=True)
    assert usual.keeps({}, generates=False) and not usual.keeps({}, generates=True)
    assert asked.keeps({}, generates=True) and not asked.keeps({"stream": True}, generates=True)


async def test_an_answer_that_is_too_large_is_not_kept() -> None:
    cache = ResponseCache(MemoryStore(), most_value_bytes=10)
    await cache.put(b"k" * 32, b"x" * 11)
    assert await cache.get(b"k" * 32) is None


# ---- memory


class MemoryMachine(RuleBasedStateMachine):
    """The memory store beside a plain dict: what it gives is what was last put there, and it stays within its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = MemoryStore(2000, self.clock)
        self.model: dict[bytes, tuple[bytes, float]] = {}

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), size=st.integers(0, 900), ttl=st.integers(1, 100))
    def put(self, key: bytes, size: int, ttl: int) -> None:
        value = key + bytes(size)
        asyncio.run(self.store.put(key, value, ttl))
        self.model[key] = (value, self.clock.now_s + ttl)

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))
    def get(self, key: bytes) -> None:
        found = asyncio.run(self.store.get(key))
        assert found is None or (found == self.model[key][0] and self.clock.now_s < self.model[key][1])

    @rule(seconds=st.integers(1, 90))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @invariant()
    def its_count_of_bytes_is_right_and_within_bounds(self) -> None:
        held = sum(len(k) + len(v) + 200 for k, (v, _) in self.store._entries.items())
        assert self.store.bytes == held <= 2000


MemoryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestMemory = MemoryMachine.TestCase


async def test_the_entry_least_lately_asked_for_leaves_first() -> None:
    store = MemoryStore(3 * 301)
    for key in (b"a", b"b", b"c"):
        await store.put(key, bytes(100), 60)
    await store.get(b"a")
    await store.put(b"d", bytes(100), 60)
    assert [await store.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


async def test_what_is_over_does_not_stay_in_memory() -> None:
    clock = Clock()
    store = MemoryStore(10_000, clock)
    await store.put(b"a", b"x", 10)
    clock.now_s += 61
    await store.put(b"b", b"x", 100)
    assert len(store) == 1


# ---- Redis


async def test_a_redis_keeps_answers_with_an_end_and_under_names_that_tell_nothing() -> None:
    fakeredis = pytest.importorskip("fakeredis")
    client = fakeredis.FakeAsyncRedis()
    cache = ResponseCache(RedisStore(client), ttl_s=60)
    key = cache.key(ASKED)
    assert await cache.get(key) is None
    await cache.put(key, ANSWER)
    assert await cache.get(key) == ANSWER
    (name,) = await client.keys("*")
    assert name == b"medcompile:" + key.hex().encode() and 0 < await client.ttl(name) <= 60
    assert b"Ann" not in await client.get(name)
    await cache.close()


async def test_a_redis_that_is_not_there_is_a_miss_and_is_left_alone_for_a_while() -> None:
    pytest.importorskip("redis")
    clock = Clock()
    store = store_at("redis://127.0.0.1:9/0")
    assert isinstance(store, RedisStore)
    store._clock = clock
    cache = ResponseCache(store)
    assert await cache.get(b"k" * 32) is None
    began_s = time.perf_counter()
    for _ in range(1000):
        await cache.put(b"k" * 32, ANSWER)
    assert time.perf_counter() - began_s < 1.0 and cache.counts.faults == 1001
    clock.now_s += 6
    with pytest.raises(StoreFault):
        await store.get(b"k" * 32)
    await cache.close()


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server")
    place = tmp_path / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(place), "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 10
    while not place.exists() and time.monotonic() < until:
        time.sleep(0.02)
    yield f"unix://{place}"
    server.terminate()
    server.wait()


async def test_a_real_redis_that_hangs_or_comes_back_costs_a_request_no_more_than_its_time(redis_url: str) -> None:
    clock = Clock()
    store = store_at(redis_url, timeout_s=0.2)
    assert isinstance(store, RedisStore)
    store._clock = clock
    cache = ResponseCache(store, ttl_s=60)
    key = cache.key(ASKED)
    await cache.put(key, ANSWER)
    assert await cache.get(key) == ANSWER
    await asyncio.create_task(_hang(store))
    began_s = time.perf_counter()
    assert await cache.get(key) is None and time.perf_counter() - began_s < 0.9
    await asyncio.sleep(1.2)
    clock.now_s += 6
    assert await cache.get(key) == ANSWER
    await cache.close()


async def _hang(store: RedisStore) -> None:
    """The server sleeps for a second; who asks meanwhile waits."""
    from redis.exceptions import RedisError

    try:
        await store._client.execute_command("DEBUG", "SLEEP", "1")
    except RedisError:
        await store._client.connection_pool.disconnect()


@pytest.mark.parametrize("url", ["", "disk", "http://x", "redis://127.0.0.1:port/0"])
def test_a_store_that_is_none_is_told(url: str) -> None:
    pytest.importorskip("redis")
    with pytest.raises(UsageError) as raised:
        store_at(url)
    assert raised.value.fix


def test_a_shared_secret_is_read_from_a_file_that_is_long_enough(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(bytes(40))
    (tmp_path / "short").write_bytes(bytes(8))
    assert len(read_secret(tmp_path / "good")) == 32
    for wrong in ("short", "none"):
        with pytest.raises(UsageError, match=wrong):
            read_secret(tmp_path / wrong)
