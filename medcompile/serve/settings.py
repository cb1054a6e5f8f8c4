"""Everything that an operator sets, with what holds unless told otherwise. Asking for it is commands/serve.py's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


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
    """

    queue: int = 256
    pending_bytes: int = 256 << 20
    timeout_s: float = 600.0
    items: int = 2048
    start_s: float = 600.0


@dataclass(frozen=True)
class Logging:
    level: str = "INFO"
    as_json: bool = True


@dataclass(frozen=True)
class Settings:
    """host, port: where to listen. drain_s: how long a stop waits for requests under way."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0
    logging: Logging = field(default_factory=Logging)
    limits: Limits = field(default_factory=Limits)
