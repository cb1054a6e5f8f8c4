"""The HTTP application: its routes, put together with what stands around them. What a route does is service.py's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import Scope

from medcompile import __version__
from medcompile.serve import docs_page, failures, metrics, openapi, replies
from medcompile.serve.audit import AuditLog
from medcompile.serve.bodies import Bodies
from medcompile.serve.cache import ResponseCache
from medcompile.serve.calls import CALLS, Call
from medcompile.serve.engine import Engine
from medcompile.serve.engines import Engines
from medcompile.serve.entrance import Entrance
from medcompile.serve.guard import Guard
from medcompile.serve.keys import Keyring
from medcompile.serve.metrics import Metrics
from medcompile.serve.scrubbing import Scrubbing
from medcompile.serve.service import Service
from medcompile.serve.settings import Settings
from medcompile.serve.trail import Trail
from medcompile.serve.watch import Watch

log = logging.getLogger("medcompile.serve")

MODEL_ROUTE = "/v1/models/{model:path}"
ROUTES = (*CALLS, "/v1/models", MODEL_ROUTE, "/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs")


@dataclass(frozen=True)
class Safety:
    """What is open while a server runs, made from its settings. All of it may be left out, in tests and at home."""

    keyring: Keyring | None = None
    audit: AuditLog | None = None
    cache: ResponseCache | None = None
    scrubbing: Scrubbing | None = None


def create_app(settings: Settings, engines: Engines, safety: Safety | None = None) -> FastAPI:
    """Over engines that are started, and over files that are open, which whoever opened them closes."""
    safety = safety or Safety()
    counted = Metrics(ROUTES)
    service = Service(settings, engines, counted, safety.cache, safety.scrubbing)
    for engine in engines:
        counted.serves(engine.name, engine.digest, engine.facts["variant"], engine.facts["target"])
    app = FastAPI(
        title="medcompile",
        summary="Medical models behind OpenAI's interface.",
        version=__version__,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service
    for call in CALLS.values():
        _add_call(app, call, service)
    _add_models(app, engines)
    _add_health(app, engines, service)
    _add_document(app, engines, with_keys=safety.keyring is not None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    _surround(app, settings, safety, counted)
    return app


def _surround(app: FastAPI, settings: Settings, safety: Safety, counted: Metrics) -> None:
    """The middlewares, the innermost first."""
    app.add_middleware(Bodies, limits=settings.body)
    app.add_middleware(Guard, keyring=safety.keyring, rules=settings.rules)
    if settings.rules.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.rules.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type", "X-Priority", "X-Purpose-Of-Use", "X-Request-ID"),
            expose_headers=("X-Request-ID", "Retry-After"),
        )
    if safety.audit:
        app.add_middleware(Trail, log=safety.audit)
    app.add_middleware(Watch, metrics=counted)
    app.add_middleware(Entrance)


class _CallRoute(Route):
    """A call's route, without what FastAPI does to bodies and answers: both are dealt with in service.py.

    It tells the scope which route it is, as FastAPI's do.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self} if match is not Match.NONE else found


def _add_call(app: FastAPI, call: Call, service: Service) -> None:
    async def route(request: Request) -> Response:
        return await service.answer(call, request)

    app.router.routes.append(_CallRoute(call.url, route, methods=["POST"], name=call.run.__name__))


def _add_models(app: FastAPI, engines: Engines) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> Response:
        """The bundles that are served here."""
        return replies.document({"object": "list", "data": [_told(engine) for engine in engines]})

    @app.get(MODEL_ROUTE, tags=["models"])
    async def model(model: str) -> Response:
        """One of them."""
        try:
            return replies.document(_told(engines.get(model)))
        except failures.ModelNotFound as error:
            return replies.failure(error)


def _add_health(app: FastAPI, engines: Engines, service: Service) -> None:
    @app.get("/health/live", tags=["watching"])
    async def live() -> Response:
        """Whether this process answers at all."""
        return replies.document({"status": "ok", "models": {}})

    @app.get("/health/ready", tags=["watching"])
    async def ready() -> Response:
        """Whether every model can answer now: 503 while one can't, or while the server stops."""
        good = all(engine.ready for engine in engines)
        states = {engine.name: str(engine.state) for engine in engines}
        return replies.document({"status": "ok" if good else "unavailable", "models": states}, 200 if good else 503)

    @app.get("/metrics", tags=["watching"])
    async def watched() -> Response:
        """Counters and times, as Prometheus reads them."""
        await service.look()
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


def _add_document(app: FastAPI, engines: Engines, *, with_keys: bool) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        return replies.document(openapi.document(app, engines, with_keys=with_keys))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        base_url = str(request.base_url).rstrip("/")
        shown = docs_page.html(openapi.document(app, engines, with_keys=with_keys), base_url)
        return HTMLResponse(shown, headers={"Content-Security-Policy": docs_page.POLICY})


def _told(engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.name,
        "object": "model",
        "created": engine.created,
        "owned_by": "medcompile",
        "digest": engine.digest,
        "tasks": list(engine.tasks),
        "variant": engine.facts.get("variant"),
        "target": engine.facts.get("target"),
        "ready": engine.ready,
    }


async def _http_error(_: Request, error: Exception) -> Response:
    """What the router itself refuses: no such route, another method."""
    assert isinstance(error, HTTPException)
    words = {404: "no such route; /docs tells those that there are", 405: "not with this method"}
    message = words.get(error.status_code, "the request can't be read")
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return replies.document(failures.told(message, kind), error.status_code, error.headers)


async def _fault(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return replies.failure(failures.Fault("the server failed on this request"))
