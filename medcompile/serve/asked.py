"""What a request is beside its body: who asks, how urgently, and, once it is answered, what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from medcompile.serve.engine import Engine


@dataclass
class Tally:
    """What a request was answered by, and what it took: for the audit log, metrics and limits. Never any content.

    items: texts, images, documents or answers. queued_s: until the model began with it. batch: items of the largest
    batch that it went through. first_token_s: until the first token; tokens_out / decode_s is its speed from there.
    """

    model: str = ""
    digest: str = ""
    artifact: str = ""
    items: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    queued_s: float | None = None
    batch: int | None = None
    first_token_s: float | None = None
    decode_s: float | None = None
    started_s: float = field(default_factory=time.monotonic)

    def met(self, engine: Engine, items: int) -> None:
        self.model, self.digest, self.items = engine.name, engine.digest, items
        self.artifact = f"{engine.facts.get('variant')}/{engine.facts.get('target')}"


@dataclass
class Asked:
    """Who asks and how urgently, beside the body. caller: a key's name; callers share no cached tokens.

    priority: where the body says none. timeout_s: for the whole answer. files: images that came beside the body.
    """

    caller: str = ""
    priority: str = "routine"
    timeout_s: float | None = None
    files: Sequence[bytes] = ()
    request_id: str = ""
    tally: Tally = field(default_factory=Tally)
