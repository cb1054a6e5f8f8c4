"""Who may ask: keys in a file, each with a name, roles, a rate and an end. Of a key the file holds the SHA-256 alone.

A key is 256 random bits, so one fast hash is as good as a slow one: there is no dictionary of keys to go through.
What a caller may ask for, and how often, is decided in guard.py; rates are counted in rates.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medcompile.errors import UsageError
from medcompile.serve.rates import Rate

ADMIN, INFERENCE, METRICS = ROLES = ("admin", "inference", "metrics")
PREFIX = "mc_"
"""What every key begins with, so that a search for leaked secrets can find one."""

_LONGEST_KEY = 256
_CHECK_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("medcompile.serve")


@dataclass(frozen=True)
class Caller:
    """Who asks. name: the key's; it may be logged. admin holds every role."""

    name: str
    roles: frozenset[str]
    rate: Rate | None = None

    def may(self, role: str) -> bool:
        return role in self.roles or ADMIN in self.roles


ANONYMOUS = Caller("anonymous", frozenset({INFERENCE, METRICS}))
"""Whoever asks a server that has no keys, which listens on this machine's own address alone."""


@dataclass(frozen=True)
class Key:
    """One line of the file. sha256: of the key, in hex. created, expires: Unix seconds; expires None is never."""

    name: str
    roles: tuple[str, ...]
    sha256: str
    created: int
    expires: int | None = None
    rate: Rate | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                "a key's name is 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit",
                fix="name it after who uses it, such as ward-3; it will stand in logs",
            )
        wrong = set(self.roles) - set(ROLES)
        if wrong or not self.roles:
            raise UsageError(f"key {self.name}: its roles are not known", fix=f"choose from: {', '.join(ROLES)}")
        if not _DIGEST.fullmatch(self.sha256):
            raise UsageError(
                f"key {self.name}: sha256 is not 64 hex digits", fix="make the key with: medcompile keys add"
            )

    @property
    def id(self) -> str:
        """Tells two keys of one name apart, and is of no use to someone who has no key."""
        return self.sha256[:8]

    @property
    def caller(self) -> Caller:
        return Caller(self.name, frozenset(self.roles), self.rate)

    def holds(self, now_s: float) -> bool:
        return self.expires is None or now_s < self.expires


def new_key() -> str:
    """A fresh key, to be shown once and given to its user."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class Keyring:
    """The keys of one file, read anew when it changes (looked at once a second) or when told to.

    A file that can't be read leaves the keys as they were, and `problem` says so: one slip of an editor must not lock
    everyone out. A file that is gone, or empty, leaves no key valid.
    """

    path: Path
    clock: Callable[[], float] = time.time
    problem: str = ""
    keys: tuple[Key, ...] = ()
    _digests: list[bytes] = field(default_factory=list)
    _seen: tuple[int, ...] = ()
    _looked_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises UsageError for a file that is not there, is malformed, or may be written by others."""
        self._seen = self._stamp()
        self._take(read(self.path))
        self._looked_s = self.clock()

    def caller(self, key: str) -> Caller | None:
        """Whose key this is; None where it is nobody's, or its time is over.

        Every stored digest is compared, each in constant time, so that how long it takes says nothing.
        """
        now_s = self.clock()
        if abs(now_s - self._looked_s) >= _CHECK_EVERY_S:
            self._looked_s = now_s
            if self._stamp() != self._seen:
                self.reload()
        if len(key) > _LONGEST_KEY:
            return None
        mine = digest(key).encode()
        found: Key | None = None
        for its, candidate in zip(self._digests, self.keys, strict=True):
            if hmac.compare_digest(its, mine):
                found = candidate
        return found.caller if found is not None and found.holds(now_s) else None

    def reload(self) -> None:
        """Read the file again, now. Never raises: see the class."""
        self._seen = self._stamp()
        try:
            self._take(read(self.path) if self._seen else ())
        except UsageError as error:
            self.problem = error.message
            log.error("the key file can't be read; the keys before it stay valid")
            return
        self.problem = "" if self._seen else f"{self.path} is gone; no key is valid"
        log.warning("keys read anew: %d", len(self.keys))

    def _take(self, keys: Sequence[Key]) -> None:
        self.keys = tuple(keys)
        self._digests = [key.sha256.encode() for key in self.keys]

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino)


# ---- the file


def read(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises UsageError, which names the line."""
    try:
        text = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}", fix="make it with: medcompile keys add NAME --file PATH"
        ) from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{path} may be written by others, who could add keys", fix=f"chmod go-w {path}")
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            keys.append(_from_line(line))
        except (ValueError, KeyError, TypeError, UsageError) as error:
            why = error.message if isinstance(error, UsageError) else "is not a key: {name, roles, sha256, created}"
            raise UsageError(f"{path}:{number}: {why}", fix="mend or remove the line") from None
    twice = len(keys) - len({key.sha256 for key in keys})
    if twice:
        raise UsageError(f"{path}: one key stands there more than once", fix="remove the lines that repeat")
    return tuple(keys)


@contextmanager
def edited(path: Path) -> Iterator[list[Key]]:
    """The keys of a file to change in place; written whole at the end, or not at all. One editor at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read(path)) if path.exists() else []
        yield keys
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.writelines(_to_line(key) + "\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def _from_line(line: bytes) -> Key:
    found: dict[str, Any] = json.loads(line)
    known = {"name", "roles", "sha256", "requests_per_minute", "burst", "created", "expires"}
    if not isinstance(found, dict) or set(found) - known:
        raise ValueError
    per_minute = found.get("requests_per_minute")
    rate = None
    if per_minute is not None:
        rate = Rate(float(per_minute), int(found["burst"]) if found.get("burst") is not None else None)
    expires = found.get("expires")
    roles = found["roles"]
    if not isinstance(roles, list) or not isinstance(found["name"], str) or not isinstance(found["sha256"], str):
        raise ValueError
    return Key(
        found["name"],
        tuple(str(role) for role in roles),
        found["sha256"],
        _seconds(found["created"]),
        None if expires is None else _seconds(expires),
        rate,
    )


def _to_line(key: Key) -> str:
    shown: dict[str, object] = {"name": key.name, "roles": list(key.roles), "sha256": key.sha256}
    if key.rate is not None:
        shown |= {"requests_per_minute": key.rate.per_minute, "burst": key.rate.burst}
    shown["created"] = told(key.created)
    shown["expires"] = None if key.expires is None else told(key.expires)
    return json.dumps(shown)


def told(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _seconds(when: str) -> int:
    return int(datetime.strptime(when, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())
