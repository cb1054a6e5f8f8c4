"""Answers kept, so that the same question to the same bundle costs nothing again. Where they are kept nobody can read
them, nor learn what was asked.

    key of an entry    HMAC-SHA-256 of what the answer depends on: bundle digest, artifact, URL, body, and the caller
    value of an entry  AES-256-GCM under a key that is derived for this entry alone, bound to the entry's key

So a store that was copied tells sizes and times alone, and a value that was moved, altered or kept beyond its time is
not taken for an answer: it can't be opened. Answers of callers are kept apart unless told otherwise: how fast an answer
comes would tell one caller what another has asked. What is generated is kept only where asked for.
Where entries lie is stores.py's.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medcompile.errors import UsageError
from medcompile.serve.chain import read_key
from medcompile.serve.stores import Store, StoreFault

WITHOUT_EFFECT = frozenset(
    {
        *("priority", "user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    }
)
"""Parts of a body that change no answer."""

_EXPIRY = struct.Struct(">d")
_NONCE = 12


@dataclass(frozen=True)
class Question:
    """What an answer depends on. body: as it was checked, with defaults filled in. caller: a key's name."""

    digest: str
    artifact: str
    url: str
    body: Mapping[str, Any]
    caller: str


@dataclass
class Counts:
    hits: int = 0
    misses: int = 0
    faults: int = 0


class ResponseCache:
    """ttl_s: how long an answer is kept. apart: callers don't share answers. generations: answers that are generated
    are kept too. secret: 32 bytes, the same in every process that shares a store; drawn anew by default.
    """

    def __init__(
        self,
        store: Store,
        *,
        ttl_s: float = 3600.0,
        apart: bool = True,
        generations: bool = False,
        secret: bytes | None = None,
        most_value_bytes: int = 8 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not ttl_s > 0:
            raise UsageError("a cache keeps answers for more than 0 seconds", fix="give for example 3600")
        self._store, self._ttl_s, self._apart, self._clock = store, ttl_s, apart, clock
        self._secret = secret or secrets.token_bytes(32)
        self._most_value_bytes = most_value_bytes
        self.generations = generations
        self.counts = Counts()

    def key(self, question: Question) -> bytes:
        """32 bytes, which only equal questions share."""
        body = {name: value for name, value in question.body.items() if name not in WITHOUT_EFFECT}
        parts = (
            question.digest,
            question.artifact,
            question.url,
            json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False),
            f"of {question.caller}" if self._apart else "of all",
        )
        said = b"".join(struct.pack(">Q", len(p)) + p for p in (part.encode() for part in parts))
        return hmac.digest(self._secret, b"key" + said, "sha256")

    def keeps(self, body: Mapping[str, Any], *, generates: bool) -> bool:
        """Whether an answer to this body may be kept. A stream is not; it is told as it comes."""
        return not body.get("stream") and (self.generations or not generates)

    async def get(self, key: bytes) -> bytes | None:
        """The answer that was put under this key and no other, if it is there and its time is not over."""
        try:
            sealed = await self._store.get(key)
        except StoreFault:
            self.counts.faults += 1
            sealed = None
        answer = None if sealed is None else self._opened(key, sealed)
        if answer is None:
            self.counts.misses += 1
        else:
            self.counts.hits += 1
        return answer

    async def put(self, key: bytes, answer: bytes) -> None:
        if len(answer) > self._most_value_bytes:
            return
        try:
            await self._store.put(key, self._sealed(key, answer), self._ttl_s)
        except StoreFault:
            self.counts.faults += 1

    async def close(self) -> None:
        await self._store.close()

    def _sealed(self, key: bytes, answer: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        plain = _EXPIRY.pack(self._clock() + self._ttl_s) + answer
        return nonce + self._cipher(key).encrypt(nonce, plain, key)

    def _opened(self, key: bytes, sealed: bytes) -> bytes | None:
        try:
            plain: bytes = self._cipher(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], key)
        except (InvalidTag, ValueError):  # another secret's, altered, moved, or cut short
            self.counts.faults += 1
            return None
        (expires_s,) = _EXPIRY.unpack_from(plain)
        return plain[_EXPIRY.size :] if self._clock() < expires_s else None

    def _cipher(self, key: bytes) -> AESGCM:
        """One key for each entry: however many are written, nonces of one key don't run out."""
        return AESGCM(hmac.digest(self._secret, b"value" + key, "sha256"))


def read_secret(path: Path) -> bytes:
    """The secret that several processes share: a file of at least 32 random bytes. Raises UsageError."""
    return hashlib.sha256(read_key(path)).digest()
