"""Everything that an operator sets, with what holds unless told otherwise. Asking for it is commands/serve.py's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medcompile.serve.audit import Fsync
from medcompile.serve.bodies import BodyLimits
from medcompile.serve.connections import ConnectionLimits
from medcompile.serve.guard import Rules


@dataclass(frozen=True)
class Model:
    """One bundle to serve. name: what clients ask for; "" is the bundle's own. The rest is what load() takes."""

    path: Path
    name: str = ""
    backend: str = "auto"
    variant: str = "auto"
    threads: int | None = None
    kv_blocks: int | None = None


@dataclass(frozen=True)
class Limits:
    """Of each model. queue: requests waiting or running; pending_bytes: of their bodies (images) together.

    timeout_s: from a request's arrival to its answer's end. items: texts, images or documents of one request.
    text_tokens: of one text that an encoder takes, in as many windows as it needs. start_s: for a bundle to load.
    stuck_s: one run of a model that takes longer hangs, and its process is ended.
    """

    queue: int = 256
    pending_bytes: int = 256 << 20
    timeout_s: float = 600.0
    items: int = 2048
    text_tokens: int = 32_768
    start_s: float = 600.0
    stuck_s: float = 300.0


@dataclass(frozen=True)
class Logging:
    level: str = "INFO"
    as_json: bool = True


@dataclass(frozen=True)
class Audit:
    """Where the audit log is kept: see audit.AuditLog."""

    folder: Path
    key_file: Path | None = None
    fsync: Fsync = "interval"


@dataclass(frozen=True)
class Cache:
    """What keeps answers: see cache.ResponseCache. url: "memory", or a Redis. shared: between callers."""

    url: str = "memory"
    ttl_s: float = 3600.0
    generations: bool = False
    shared: bool = False
    secret_file: Path | None = None


@dataclass(frozen=True)
class Scrub:
    """Takes identifiers out of texts: see scrub.Scrubber. names_file: people to find, one a line."""

    names_file: Path | None = None
    model: str = ""


@dataclass(frozen=True)
class Tls:
    """client_ca: clients must show a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class Settings:
    """host, port: where to listen. drain_s: how long a stop waits for requests under way. key_file: who may ask."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0
    key_file: Path | None = None
    tls: Tls | None = None
    audit: Audit | None = None
    cache: Cache | None = None
    scrub: Scrub | None = None
    rules: Rules = field(default_factory=Rules)
    body: BodyLimits = field(default_factory=BodyLimits)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    logging: Logging = field(default_factory=Logging)
    limits: Limits = field(default_factory=Limits)
