"""All bundles that one server has, by the name that a request asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from medcompile.errors import UsageError
from medcompile.serve.engine import Engine
from medcompile.serve.failures import ModelNotFound
from medcompile.serve.settings import Limits, Logging, Model


class Engines:
    """The engines, in the order given. An async context manager: started inside, closed after.

    Raises BundleError for a folder that is no bundle, UsageError for none at all or two of one name.
    """

    def __init__(self, models: Sequence[Model], limits: Limits | None = None, logging: Logging | None = None) -> None:
        self.limits = limits or Limits()
        self._engines: dict[str, Engine] = {}
        if not models:
            raise UsageError("no bundle to serve", fix="give the folder of one, such as engines/quickstart")
        for model in models:
            engine = Engine(model, self.limits, logging or Logging())
            if engine.name in self._engines:
                raise UsageError(f"two bundles are named {engine.name}", fix=f"name one anew: other-name={model.path}")
            self._engines[engine.name] = engine

    def get(self, name: str) -> Engine:
        """Raises ModelNotFound, which tells the names that there are and not the one asked for."""
        engine = self._engines.get(name)
        if engine is None:
            raise ModelNotFound(
                "no model of this name is served here", fix=f"choose from: {', '.join(self._engines)}", param="model"
            )
        return engine

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def __len__(self) -> int:
        return len(self._engines)

    async def start(self) -> None:
        """Load all at once. Where one can't be, all are closed and its error is raised."""
        try:
            async with asyncio.TaskGroup() as group:
                for engine in self:
                    group.create_task(engine.start())
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None

    def refuse(self) -> None:
        """Take nothing new from now on."""
        for engine in self:
            engine.refuse()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and wait for what is under way, so long at most."""
        every = [asyncio.ensure_future(engine.drain()) for engine in self]
        _, late = await asyncio.wait(every, timeout=timeout_s)
        for task in late:
            task.cancel()

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self))

    async def __aenter__(self) -> Engines:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
