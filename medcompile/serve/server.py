"""The server as a process: models started, the port opened, signals heeded, everything closed in the right order.

SIGTERM and SIGINT drain: nothing new is taken, what is under way is answered, for as long as the settings say. A
second one cuts that short.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from medcompile.serve import logs
from medcompile.serve.app import create_app
from medcompile.serve.engines import Engines
from medcompile.serve.private import no_dumps
from medcompile.serve.settings import Model, Settings

Listening = Callable[[str, Engines], None]
"""Called once requests can come, with the server's URL."""


def run(settings: Settings, models: Sequence[Model], listening: Listening) -> None:
    """Serve until a signal comes. Raises what keeps a bundle from loading, before any port is open."""
    no_dumps()
    logs.configure(settings.logging.level, as_json=settings.logging.as_json)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(settings, models, listening))


async def serve(settings: Settings, models: Sequence[Model], listening: Listening) -> None:
    engines = Engines(models, settings.limits, settings.logging)
    async with engines:
        app = create_app(settings, engines)

        def stop() -> None:
            app.state.service.metrics.draining()
            engines.refuse()
            logs.event("draining")

        def told(url: str) -> None:
            logs.event("listening", {"url": url})
            listening(url, engines)

        await _Server(config(settings, app), stop, told).serve()


def config(settings: Settings, app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )


class _Server(uvicorn.Server):
    def __init__(self, its_config: uvicorn.Config, stop: Callable[[], None], told: Callable[[str], None]) -> None:
        super().__init__(its_config)
        self._stop = stop
        self._told = told

    async def startup(self, sockets: Any = None) -> None:
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
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

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
