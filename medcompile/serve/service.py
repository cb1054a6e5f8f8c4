"""One request from its bytes to its answer: what every route does around the call itself.

The body is read and checked, the call made while the client is there, and what it took is told to the metrics.
Who may ask at all is guard.py's, what is answered calls.py's.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from medcompile.errors import MedcompileError
from medcompile.runtime.deadlines import Priority
from medcompile.serve import replies, uploads, wire
from medcompile.serve.asked import Asked, Tally
from medcompile.serve.cache import Question, ResponseCache
from medcompile.serve.calls import Call
from medcompile.serve.engines import Engines
from medcompile.serve.failures import Draining, QueueFull, TooLarge
from medcompile.serve.metrics import EngineState, Metrics
from medcompile.serve.scrubbing import Scrubbing
from medcompile.serve.settings import Settings

log = logging.getLogger("medcompile.serve")

LEFT = 499
"""The status of a request whose client left before the end, in the audit log as in the metrics."""
_PRIORITIES = frozenset(Priority)
UPLOADS = "/v1/match"
"""The one route that takes files beside JSON."""
_REASONS: Mapping[type[MedcompileError], str] = {QueueFull: "queue_full", Draining: "draining", TooLarge: "too_large"}


class Service:
    """What all routes share. connections: how many are open, where a server is there to tell."""

    def __init__(
        self,
        settings: Settings,
        engines: Engines,
        metrics: Metrics,
        cache: ResponseCache | None = None,
        scrubbing: Scrubbing | None = None,
    ) -> None:
        self.settings = settings
        self.engines = engines
        self.metrics = metrics
        self._cache = cache
        self._sizes: dict[str, Counter[int]] = {}
        self._restarts: Counter[str] = Counter()  # of each model's process, as told to the metrics
        self._scrubbing = scrubbing
        self.connections: Callable[[], int] = lambda: 0

    async def answer(self, call: Call, request: Request) -> Response:
        """Whatever happens, a response: errors have OpenAI's shape."""
        asked = self._asked(request)
        try:
            content = await uploads.read(request, multipart=call.url == UPLOADS)
            answer = await replies.while_connected(request.receive, self._made(call, content, request, asked))
        except (replies.ClientLeft, ClientDisconnect):
            await self._ended(asked, LEFT)
            return Response(status_code=LEFT)
        except Exception as error:  # noqa: BLE001  # the client gets a Fault, the log the place
            response = self._failed(error)
            await self._ended(asked, response.status_code)
            return response
        if isinstance(answer, AsyncGenerator):
            return replies.EventStream(answer, lambda error: self._stream_ended(asked, error))
        await self._ended(asked, 200)
        return Response(answer, media_type=replies.JSON)

    async def _made(
        self, call: Call, content: uploads.Content, request: Request, asked: Asked
    ) -> bytes | AsyncGenerator[dict[str, Any], None]:
        """The answer's document, or its pieces."""
        asked.files = content.files
        body = call.checked(content.body)
        key = self._key(call, body, asked)
        if key and self._cache:
            kept = await self._cache.get(key)
            self.metrics.cache(kept is not None)
            if kept is not None:
                request.scope["state"]["cached"] = True
                return kept
        run = call.run if self._scrubbing is None else partial(self._scrubbing.run, call)
        answer = await run(self.engines, body, asked)
        if isinstance(answer, AsyncGenerator):
            return answer
        document = wire.dumps(answer)
        if key and self._cache:
            await self._cache.put(key, document)
        return document

    def _key(self, call: Call, body: BaseModel, asked: Asked) -> bytes | None:
        """Under which the answer is kept, or None where it is not to be."""
        if self._cache is None:
            return None
        told = body.model_dump(mode="json", by_alias=True)
        if not self._cache.keeps(told, generates=call.generates):
            return None
        asked.tally.met(self.engines.get(told["model"]), 0)
        told["files"] = [hashlib.sha256(file).hexdigest() for file in asked.files]
        told["scrubbed"] = self._scrubbing is not None
        tally = asked.tally
        return self._cache.key(Question(tally.digest, tally.artifact, call.url, told, asked.caller))

    def _asked(self, request: Request) -> Asked:
        """Who asks; the tally is put where trail.py looks for it."""
        state = request.scope.setdefault("state", {})
        caller = state.get("caller")
        priority = request.headers.get("x-priority", Priority.ROUTINE).lower()
        state["tally"] = tally = Tally()
        return Asked(
            tally=tally,
            caller=str(getattr(caller, "name", "")),
            priority=priority if priority in _PRIORITIES else Priority.ROUTINE,
            request_id=str(state.get("request_id", "")),
        )

    def _failed(self, error: Exception) -> Response:
        if not isinstance(error, MedcompileError):
            log.error("a request failed", exc_info=error)
        for kind, reason in _REASONS.items():
            if isinstance(error, kind):
                self.metrics.refused(reason)
        return replies.failure(error)

    async def _stream_ended(self, asked: Asked, error: BaseException | None) -> None:
        if error is None:
            status = 200
        elif isinstance(error, Exception) and not isinstance(error, replies.ClientLeft):
            status = self._failed(error).status_code
        else:
            status = LEFT
        await self._ended(asked, status)

    async def _ended(self, asked: Asked, status: int) -> None:
        """Count it. What never reached a model has nothing to count."""
        tally = asked.tally
        if tally.model:
            _count(self.metrics, tally, asked.priority)

    async def look(self) -> None:
        """Ask each worker how it is, for the metrics."""
        self.metrics.connections(self.connections())
        for engine in self.engines:
            self.metrics.worker(engine.name, engine.ready)
            while self._restarts[engine.name] < engine.restarts:
                self._restarts[engine.name] += 1
                self.metrics.restarted(engine.name)
            told = await engine.stats()
            if not told:  # down, or too busy to say: what it counted last stands
                continue
            self.metrics.engine(engine.name, _state(told, engine.resident_bytes))
            self._count_batches(engine.name, Counter({int(n): k for n, k in told.get("sizes", {}).items()}))

    def _count_batches(self, model: str, sizes: Counter[int]) -> None:
        """sizes: how many batches of each size there were since the worker began, which may be anew."""
        before = self._sizes.get(model, Counter())
        if not sizes >= before:
            before = Counter()
        self._sizes[model] = sizes
        for size in (sizes - before).elements():
            self.metrics.batch(model, size)


def _count(metrics: Metrics, tally: Tally, priority: str) -> None:
    model = tally.model
    metrics.tokens(model, tally.tokens_in, tally.tokens_out)
    if tally.queued_s is not None:
        metrics.queued(model, priority, tally.queued_s)
    if tally.batch is not None:
        metrics.items(model, tally.items)
    if tally.first_token_s is not None:
        metrics.first_token(model, tally.first_token_s)
        if tally.decode_s and tally.tokens_out > tally.items:
            metrics.output_token(model, tally.decode_s * tally.items / (tally.tokens_out - tally.items))


def _state(told: Mapping[str, Any], resident_bytes: int) -> EngineState:
    return EngineState(
        waiting=int(told.get("waiting", 0)),
        running=int(told.get("running", 0)),
        kv_blocks=int(told.get("blocks", 0)),
        kv_blocks_used=int(told.get("blocks", 0)) - int(told.get("free_blocks", 0)),
        resident_bytes=resident_bytes,
        preemptions=int(told.get("preemptions", 0)),
        steps=int(told.get("steps", told.get("batches", 0))),
        computed_tokens=int(told.get("computed", 0)),
        cached_tokens=int(told.get("cached", 0)),
        guessed_tokens=int(told.get("guessed", 0)),
        accepted_tokens=int(told.get("accepted", 0)),
    )
