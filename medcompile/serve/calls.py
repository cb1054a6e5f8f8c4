"""What the server can be asked, one call for each URL: a body in, an answer out, whoever carries it.

    answer = await CALLS["/v1/embeddings"](engines, {"model": ..., "input": ...}, Asked(caller="ward-3"))

HTTP routes and batch files both go through here. An answer is a dict for wire.dumps() (rows of numbers are numpy
arrays), or, where the body says `stream`, an async iterator of such dicts. Errors are raised: failures.py makes
OpenAI's shape and a status of them. What an answer cost is in asked.tally when it is there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from medcompile.serve import encoding, generation, schemas
from medcompile.serve.asked import Asked
from medcompile.serve.engines import Engines
from medcompile.serve.failures import of_validation

__all__ = ["CALLS", "Answer", "Asked", "Call"]

Answer = dict[str, Any] | AsyncGenerator[dict[str, Any], None]


@dataclass(frozen=True)
class Call:
    """One URL. body: its schema. generates: answers are drawn, not computed, so that none is kept unless asked for."""

    url: str
    body: type[BaseModel]
    run: Callable[[Engines, Any, Asked], Awaitable[Answer]]
    generates: bool = False

    async def __call__(self, engines: Engines, body: Mapping[str, Any], asked: Asked) -> Answer:
        """Raises BadRequest for a body that does not fit, ModelNotFound, QueueFull, WorkerDown, DeadlinePassed, or a
        MedcompileError of the session: see failures.status_of()."""
        return await self.run(engines, self.checked(body), asked)

    def checked(self, body: Mapping[str, Any] | bytes) -> BaseModel:
        """The body, parsed where it is bytes of JSON. Raises BadRequest, which does not say what was sent."""
        try:
            if isinstance(body, bytes):
                return self.body.model_validate_json(body)
            return self.body.model_validate(body)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            raise of_validation(problems, tuple(self.body.model_fields)) from None


_EVERY = (
    Call("/v1/chat/completions", schemas.ChatRequest, generation.chat, generates=True),
    Call("/v1/completions", schemas.CompletionRequest, generation.complete, generates=True),
    Call("/v1/embeddings", schemas.EmbeddingRequest, encoding.embed),
    Call("/v1/rerank", schemas.RerankRequest, encoding.rerank),
    Call("/v1/entities", schemas.EntitiesRequest, encoding.extract),
    Call("/v1/classify", schemas.ClassifyRequest, encoding.classify),
    Call("/v1/match", schemas.MatchRequest, encoding.match),
)
CALLS: Mapping[str, Call] = {call.url: call for call in _EVERY}
