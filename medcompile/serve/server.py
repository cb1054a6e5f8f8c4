"""The server as a process: models started, the port opened, signals heeded, everything closed in the right order.

SIGTERM and SIGINT drain: nothing new is taken, what is under way is answered, for as long as the settings say. A
second one cuts that short. SIGHUP reads the keys anew.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import uvicorn

from medcompile.serve import logs
from medcompile.serve.app import Safety, create_app
from medcompile.serve.audit import AuditLog
from medcompile.serve.cache import ResponseCache, read_secret
from medcompile.serve.chain import read_key
from medcompile.serve.connections import Door, handshakes_within
from medcompile.serve.engines import Engines
from medcompile.serve.guard import check_binding
from medcompile.serve.keys import Keyring
from medcompile.serve.private import no_dumps
from medcompile.serve.scrub import Scrubber, read_names
from medcompile.serve.scrubbing import Scrubbing
from medcompile.serve.service import Service
from medcompile.serve.settings import Model, Settings
from medcompile.serve.status import Look, line
from medcompile.serve.stores import store_at

log = logging.getLogger("medcompile.serve")

KEEP_ALIVE_S = 75
"""Between two requests of one connection: longer than load balancers keep theirs, which must close first."""

STATUS_S = 5.0
Listening = Callable[[str, Engines], None]
"""Called once requests can come, with the server's URL."""


def run(
    settings: Settings, models: Sequence[Model], listening: Listening, status: Callable[[str], None] | None = None
) -> None:
    """Serve until a signal comes. Raises what keeps a bundle from loading, before any port is open."""
    no_dumps()
    logs.configure(settings.logging.level, as_json=settings.logging.as_json)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(settings, models, listening, status))


async def serve(
    settings: Settings, models: Sequence[Model], listening: Listening, status: Callable[[str], None] | None = None
) -> None:
    """Files are opened first, since they cost nothing; then models are loaded, then the port is opened."""
    warning = check_binding(settings.host, keys=settings.key_file is not None, tls=settings.tls is not None)
    if warning:
        log.warning(warning)
    async with AsyncExitStack() as open_things:
        safety = await _safety(settings, open_things)
        engines = await open_things.enter_async_context(Engines(models, settings.limits, settings.logging))
        app = create_app(settings, engines, safety)
        if safety.audit:
            safety.audit.event("started", {engine.name: engine.digest for engine in engines})

        def stop() -> None:
            app.state.service.metrics.draining()
            engines.refuse()
            logs.event("draining")

        def told(url: str) -> None:
            logs.event("listening", {"url": url})
            listening(url, engines)

        door = Door(settings.connections)
        app.state.service.connections = door.__len__
        telling = asyncio.create_task(_tell(app.state.service, status)) if status else None
        await _Server(config(settings, app, door), stop, told, safety.keyring, door).serve()
        if telling:
            telling.cancel()
        if safety.audit:
            safety.audit.event("stopped")


async def _tell(service: Service, status: Callable[[str], None]) -> None:
    """How the server fares, in one line, whenever something happened."""
    before = Look.of(service.metrics.registry.collect())
    while True:
        await asyncio.sleep(STATUS_S)
        await service.look()
        now = Look.of(service.metrics.registry.collect())
        if now.sum("medcompile_requests_total") != before.sum("medcompile_requests_total"):
            status(line(now, before))
        before = now


async def _safety(settings: Settings, open_things: AsyncExitStack) -> Safety:
    keyring = Keyring(settings.key_file) if settings.key_file else None
    audit, cache = None, None
    if s := settings.audit:
        log_key = read_key(s.key_file) if s.key_file else None
        audit = open_things.enter_context(AuditLog(s.folder, key=log_key, fsync=s.fsync))
    if c := settings.cache:
        secret = read_secret(c.secret_file) if c.secret_file else None
        cache = ResponseCache(
            store_at(c.url), ttl_s=c.ttl_s, apart=not c.shared, generations=c.generations, secret=secret
        )
        open_things.push_async_callback(cache.close)
    scrubbing = None
    if w := settings.scrub:
        scrubbing = Scrubbing(Scrubber(names=read_names(w.names_file) if w.names_file else (), model=w.model))
    return Safety(keyring, audit, cache, scrubbing)


def config(settings: Settings, app: Any, door: Door) -> uvicorn.Config:
    tls = settings.tls
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=door.protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        backlog=4096,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        ssl_certfile=str(tls.certificate) if tls else None,
        ssl_keyfile=str(tls.key) if tls else None,
        ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
    )


class _Server(uvicorn.Server):
    def __init__(
        self,
        its_config: uvicorn.Config,
        stop: Callable[[], None],
        told: Callable[[str], None],
        keyring: Keyring | None,
        door: Door,
    ) -> None:
        super().__init__(its_config)
        self._door = door
        self._keyring = keyring
        self._stop = stop
        self._told = told

    async def startup(self, sockets: Any = None) -> None:
        with handshakes_within(self._door.limits.head_s):
            await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            scheme = "https" if self.config.is_ssl else "http"
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            self._told(f"{scheme}://{host}:{port}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the process at the end, before the models are closed."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in signals[:2]:
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, self._read_anew)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _read_anew(self) -> None:
        if self._keyring:
            self._keyring.reload()

    def _signalled(self) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            self.should_exit = True
            self._stop()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop
