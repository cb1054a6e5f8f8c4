"""One request from its bytes to its answer: what every route does around the call itself.

The body is read and checked, the call made while the client is there, and what it took is told to the metrics.
Who may ask at all is guard.py's, what is answered calls.py's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from medcompile.errors import MedcompileError
from medcompile.runtime.deadlines import Priority
from medcompile.serve import replies, uploads
from medcompile.serve.asked import Asked, Tally
from medcompile.serve.calls import Answer, Call
from medcompile.serve.engine import Engine
from medcompile.serve.engines import Engines
from medcompile.serve.failures import Draining, QueueFull, TooLarge
from medcompile.serve.metrics import EngineState, Metrics
from medcompile.serve.settings import Settings

log = logging.getLogger("medcompile.serve")

LEFT = 499
"""The status of a request whose client left before the end, in the audit log as in the metrics."""
UPLOADS = "/v1/match"
"""The one route that takes files beside JSON."""
_REASONS: Mapping[type[MedcompileError], str] = {QueueFull: "queue_full", Draining: "draining", TooLarge: "too_large"}


class Service:
    """What all routes share."""

    def __init__(self, settings: Settings, engines: Engines, metrics: Metrics) -> None:
        self.settings = settings
        self.engines = engines
        self.metrics = metrics

    async def answer(self, call: Call, request: Request) -> Response:
        """Whatever happens, a response: errors have OpenAI's shape."""
        asked = self._asked(request)
        try:
            answer = await replies.while_connected(request.receive, self._made(call, request, asked))
        except replies.ClientLeft:
            await self._ended(asked, LEFT)
            return Response(status_code=LEFT)
        except Exception as error:  # noqa: BLE001  # the client gets a Fault, the log the place
            response = self._failed(error)
            await self._ended(asked, response.status_code)
            return response
        if isinstance(answer, AsyncGenerator):
            return replies.EventStream(answer, lambda error: self._stream_ended(asked, error))
        await self._ended(asked, 200)
        return replies.document(answer)

    async def _made(self, call: Call, request: Request, asked: Asked) -> Answer:
        content = await uploads.read(request, multipart=call.url == UPLOADS)
        asked.files = content.files
        return await call.run(self.engines, call.checked(content.body), asked)

    def _asked(self, request: Request) -> Asked:
        state = request.scope.get("state", {})
        caller = state.get("caller")
        priority = request.headers.get("x-priority", Priority.ROUTINE).lower()
        return Asked(
            caller=str(getattr(caller, "name", "")),
            priority=priority if priority in set(Priority) else Priority.ROUTINE,
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

    async def watch(self) -> bytes:
        """The text of /metrics, with each worker asked how it is."""
        for engine in self.engines:
            self.metrics.worker(engine.name, engine.ready)
            self.metrics.engine(engine.name, await _state(engine))
        return self.metrics.text()


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


async def _state(engine: Engine) -> EngineState:
    told: Mapping[str, Any] = await engine.stats()
    return EngineState(
        waiting=int(told.get("waiting", 0)),
        running=int(told.get("running", 0)),
        kv_blocks=int(told.get("blocks", 0)),
        kv_blocks_used=int(told.get("blocks", 0)) - int(told.get("free_blocks", 0)),
        resident_bytes=engine.resident_bytes,
        preemptions=int(told.get("preemptions", 0)),
        steps=int(told.get("steps", told.get("batches", 0))),
        computed_tokens=int(told.get("computed", 0)),
        cached_tokens=int(told.get("cached", 0)),
        guessed_tokens=int(told.get("guessed", 0)),
        accepted_tokens=int(told.get("accepted", 0)),
    )
