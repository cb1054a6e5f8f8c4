"""Where the response cache's sealed values lie: in this process, or in a Redis. Neither learns what they are."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from medcompile.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from redis.asyncio import Redis

_OVERHEAD = 200
"""Bytes of an entry in memory beside its value."""
_REST_AFTER_FAULT_S = 5.0

log = logging.getLogger("medcompile.serve")


class Store(Protocol):
    """Needs neither to be trusted nor to be there: where it raises StoreFault, nothing was found."""

    async def get(self, key: bytes) -> bytes | None: ...
    async def put(self, key: bytes, value: bytes, ttl_s: float) -> None: ...
    async def close(self) -> None: ...


class StoreFault(Exception):
    """A store could not be reached, or gave an error."""


class MemoryStore:
    """In this process; the entries least lately asked for leave first. most_bytes: with what keeping them takes."""

    def __init__(self, most_bytes: int = 256 << 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes, self._clock = most_bytes, clock
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._swept_s = clock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: bytes) -> bytes | None:
        found = self._entries.get(key)
        if found is None:
            return None
        if self._clock() >= found[1]:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return found[0]

    async def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        now_s = self._clock()
        if now_s - self._swept_s > min(ttl_s, 60.0):
            self._swept_s = now_s
            for old in [k for k, (_, end_s) in self._entries.items() if end_s <= now_s]:
                self._drop(old)
        if key in self._entries:
            self._drop(key)
        size = len(key) + len(value) + _OVERHEAD
        if size > self._most_bytes:
            return
        self._entries[key] = (value, now_s + ttl_s)
        self.bytes += size
        while self.bytes > self._most_bytes:
            self._drop(next(iter(self._entries)))

    async def close(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def _drop(self, key: bytes) -> None:
        value, _ = self._entries.pop(key)
        self.bytes -= len(key) + len(value) + _OVERHEAD


class RedisStore:
    """In a Redis. One that fails or is slow is left alone for some seconds, so that requests don't wait for it."""

    def __init__(self, client: Redis, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock
        self._rests_until_s = 0.0

    async def get(self, key: bytes) -> bytes | None:
        found = await self._asked(self._client.get(_named(key)))
        return found if isinstance(found, bytes) else None

    async def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        await self._asked(self._client.set(_named(key), value, px=max(1, int(ttl_s * 1000))))

    async def close(self) -> None:
        await self._client.aclose()

    async def _asked(self, call: Any) -> Any:
        from redis.exceptions import RedisError

        if self._clock() < self._rests_until_s:
            call.close()
            raise StoreFault
        try:
            return await call
        except (RedisError, OSError, TimeoutError) as error:
            self._rests_until_s = self._clock() + _REST_AFTER_FAULT_S
            log.warning("the cache's store failed: %s; left alone for %d s", type(error).__name__, _REST_AFTER_FAULT_S)
            raise StoreFault from None


def store_at(url: str, *, most_bytes: int = 256 << 20, timeout_s: float = 0.25) -> Store:
    """The store of a URL: "memory", or redis://, rediss:// (TLS), unix://. Nothing is asked of it yet."""
    if url == "memory":
        return MemoryStore(most_bytes)
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise UsageError("a cache is memory, or the URL of a Redis", fix="write for example redis://127.0.0.1:6379/0")
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise BackendUnavailable(
            "a cache in Redis needs the package redis", fix="pip install 'medcompile[redis]'"
        ) from error
    try:
        client = Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
    except ValueError:
        raise UsageError("the URL of the Redis can't be read", fix="write redis://HOST:PORT/NUMBER") from None
    return RedisStore(client)


def _named(key: bytes) -> str:
    return f"medcompile:{key.hex()}"
