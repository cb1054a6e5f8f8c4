"""The calls of decoders: chat and completions, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from medcompile.serve import schemas
from medcompile.serve.asked import Asked
from medcompile.serve.engines import Engines

Answer = dict[str, Any] | AsyncIterator[dict[str, Any]]


async def chat(engines: Engines, body: schemas.ChatRequest, asked: Asked) -> Answer:
    raise NotImplementedError


async def complete(engines: Engines, body: schemas.CompletionRequest, asked: Asked) -> Answer:
    raise NotImplementedError
