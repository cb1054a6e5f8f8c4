"""The HTTP application: routes over calls.py, and errors in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import Response

from medcompile import __version__
from medcompile.serve import failures, wire
from medcompile.serve.calls import CALLS, Asked, Call
from medcompile.serve.engines import Engines
from medcompile.serve.settings import Settings

log = logging.getLogger("medcompile.serve")


def create_app(settings: Settings, engines: Engines) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engines:
            yield
            await engines.drain(settings.drain_s)

    app = FastAPI(title="medcompile", version=__version__, lifespan=lifespan)
    for call in CALLS.values():
        _add(app, call, engines)
    return app


def _add(app: FastAPI, call: Call, engines: Engines) -> None:
    async def route(request: Request) -> Response:
        try:
            body = call.checked(await request.body())
            answer = await call.run(engines, body, Asked())
        except Exception as error:  # noqa: BLE001
            return Response(
                wire.dumps(failures.body_of(error)),
                failures.status_of(error),
                failures.headers_of(error),
                "application/json",
            )
        return Response(wire.dumps(answer), media_type="application/json")

    app.post(call.url)(route)
