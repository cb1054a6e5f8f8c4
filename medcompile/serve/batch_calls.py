"""What answers a batch's requests: the same calls as the server's routes, without the HTTP around them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from medcompile.errors import MedcompileError
from medcompile.serve import failures, logs, wire
from medcompile.serve.asked import Asked
from medcompile.serve.audit import AuditLog, Record
from medcompile.serve.batch_lines import Answered, Request
from medcompile.serve.calls import CALLS
from medcompile.serve.engine import Engine
from medcompile.serve.engines import Engines
from medcompile.serve.files import Folder
from medcompile.serve.scrubbing import Scrubbing
from medcompile.serve.settings import Limits

LIMITS = Limits(queue=8192, timeout_s=3600.0)
"""Lines of engines that only a batch asks: it bounds by itself what is in flight. A request that hangs ends at last."""
CALLER = "batch"
"""Who asks, for the audit log; requests of one batch share computed tokens."""
BACK_S = 300.0
"""How long a model's process may take to come back before the batch is given up."""

log = logging.getLogger("medcompile.serve")


class Calls:
    """Answers requests by these engines. folder: where the images of requests are that name one.

    scrubbing: what texts go through on their way; images don't. audit: gets a record of every request.
    """

    def __init__(
        self,
        engines: Engines,
        folder: Folder | None = None,
        scrubbing: Scrubbing | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self._engines = engines
        self._folder = folder
        self._scrubbing = scrubbing
        self._audit = audit

    async def ask(self, request: Request, request_id: str) -> Answered:
        """Whatever is wrong becomes a status and OpenAI's error. Raises AuditError alone: no answer has no record."""
        asked = Asked(caller=CALLER, priority="background", request_id=request_id)
        try:
            body = wire.dumps(await self._made(request, asked))
            answered = Answered(200, body, tokens_in=asked.tally.tokens_in, tokens_out=asked.tally.tokens_out)
        except MedcompileError as error:
            answered = _failed(error)
        except Exception as error:  # noqa: BLE001  # a bug on one line must not end the others
            log.error("a request failed: %s at %s", logs.kind(error), (logs.places(error) or [""])[-1])
            answered = _failed(error)
        if self._audit is not None:
            await self._record(self._audit, request, asked, answered.status)
        return answered

    async def _made(self, request: Request, asked: Asked) -> Any:
        call = CALLS[request.url]
        if request.image:
            assert self._folder is not None
            asked.files = [await asyncio.to_thread(self._folder.read, request.image)]
        body = call.checked(request.body)
        if self._scrubbing is not None:
            return await self._scrubbing.run(call, self._engines, body, asked)
        return await call.run(self._engines, body, asked)

    async def _record(self, audit: AuditLog, request: Request, asked: Asked, status: int) -> None:
        tally = asked.tally
        record = Record(
            caller=CALLER,
            request_id=asked.request_id,
            route=request.url,
            status=status,
            model=tally.model,
            bundle=tally.digest,
            items=tally.items,
            tokens_in=tally.tokens_in,
            tokens_out=tally.tokens_out,
        )
        if audit.waits:
            await asyncio.to_thread(audit.append, record)
        else:
            audit.append(record)

    async def ready(self, request: Request) -> None:
        """Wait for a model's process that is being started again. Raises MedcompileError if it does not come back."""
        engine = self._engine(request.body)
        if engine is None or engine.ready:
            return
        try:
            async with asyncio.timeout(BACK_S):
                await engine.until_ready()
        except TimeoutError:
            raise MedcompileError(
                f"{engine.name} has not come back for {BACK_S:.0f} s",
                fix="see above what ended its process; the same command goes on where this one ended",
            ) from None

    def _engine(self, body: Mapping[str, Any]) -> Engine | None:
        """None for a model that is not here, which the call will tell."""
        name = body.get("model")
        return next((engine for engine in self._engines if engine.name == name), None)


def _failed(error: Exception) -> Answered:
    status = failures.status_of(error)
    after_s = error.retry_after_s if isinstance(error, failures.ServeError) else None
    return Answered(status, wire.dumps(failures.body_of(error)), after_s)
