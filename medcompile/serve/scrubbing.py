"""Calls with scrubbing around them: texts lose their identifiers before a model sees them, and what it generates before
a client does. Entities are told where they lie in the text that was sent.

What can't be scrubbed is refused where it is asked for: token ids as a prompt, and logprobs, which spell an answer out
a second time. Images are not scrubbed: what is burned into their pixels stays there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from medcompile.errors import InputError
from medcompile.serve import schemas
from medcompile.serve.asked import Asked
from medcompile.serve.calls import Answer, Call
from medcompile.serve.engines import Engines
from medcompile.serve.failures import NotSupported
from medcompile.serve.scrub import Scrubbed, Scrubber
from medcompile.serve.scrub_stream import ScrubbedStream

LONGEST = 500_000
"""Characters of all texts of one request: some seconds of work."""

_TEXTS: Mapping[type[Any], tuple[str, ...]] = {
    schemas.ChatRequest: ("messages",),
    schemas.CompletionRequest: ("prompt",),
    schemas.EmbeddingRequest: ("input",),
    schemas.EntitiesRequest: ("input",),
    schemas.ClassifyRequest: ("input", "pairs"),
    schemas.RerankRequest: ("query", "documents"),
    schemas.MatchRequest: ("prompts", "templates"),
}
"""Where a body holds texts."""
_NOT_TEXTS = frozenset({"role", "type", "image_url"})
"""Keys inside of those whose strings are no texts."""


class Scrubbing:
    def __init__(self, scrubber: Scrubber) -> None:
        self._scrubber = scrubber

    async def run(self, call: Call, engines: Engines, body: Any, asked: Asked) -> Answer:
        """call.run() of the scrubbed body. Raises NotSupported, and InputError for a text that takes too long."""
        _refuse(body)
        told = body.model_dump(by_alias=True, exclude_unset=True)
        texts = [text for name in _TEXTS[type(body)] for text in _strings(told.get(name))]
        if sum(map(len, texts)) > LONGEST:
            raise InputError(
                f"texts of {sum(map(len, texts))} characters; scrubbing takes {LONGEST} at most",
                fix="send several requests",
            )
        scrubbed = dict(zip(texts, await asyncio.to_thread(self._each, texts), strict=True))
        told |= {name: _exchanged(told[name], scrubbed) for name in _TEXTS[type(body)] if name in told}
        answer = await call.run(engines, call.checked(told), asked)
        if isinstance(answer, AsyncGenerator):
            return self._streamed(answer)
        if isinstance(body, schemas.EntitiesRequest):
            inputs = [body.input] if isinstance(body.input, str) else body.input
            for one in answer["data"]:
                one["entities"] = [_at_original(entity, scrubbed[inputs[one["index"]]]) for entity in one["entities"]]
        if call.generates:
            await asyncio.to_thread(self._generated, answer)
        return answer

    def _each(self, texts: list[str]) -> list[Scrubbed]:
        return [self._scrubber.scrub(text) for text in texts]

    def _generated(self, answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            holder, name = (choice["message"], "content") if "message" in choice else (choice, "text")
            holder[name] = self._scrubber.scrub(holder[name]).text

    async def _streamed(self, answer: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
        """Each choice's pieces, held back as long as scrub_stream.py needs; the rest comes with its finish reason."""
        streams: dict[int, ScrubbedStream] = {}
        async with aclosing(answer) as pieces:
            async for piece in pieces:
                for choice in piece["choices"]:
                    stream = streams.setdefault(choice["index"], ScrubbedStream(self._scrubber))
                    holder, name = (choice["delta"], "content") if "delta" in choice else (choice, "text")
                    said = await asyncio.to_thread(stream.feed, holder.get(name) or "")
                    if choice["finish_reason"]:
                        said += await asyncio.to_thread(stream.finish)
                    if said or name in holder:
                        choice["delta" if "delta" in choice else name] = (
                            {**holder, name: said} if "delta" in choice else said
                        )
                yield piece


def _refuse(body: Any) -> None:
    if getattr(body, "logprobs", None):
        raise NotSupported("logprobs spell the answer out unscrubbed", fix="leave logprobs out", param="logprobs")
    if isinstance(body, schemas.CompletionRequest) and not all(
        isinstance(prompt, str) for prompt in ([body.prompt] if isinstance(body.prompt, str) else body.prompt)
    ):
        raise NotSupported("token ids can't be scrubbed", fix="send the prompt as text", param="prompt")


def _strings(value: Any) -> Iterator[str]:
    """All texts within, keys of mappings (named prompts) included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name not in _NOT_TEXTS:
                yield from _strings(one)


def _exchanged(value: Any, by: Mapping[str, Scrubbed]) -> Any:
    if isinstance(value, str):
        return by[value].text
    if isinstance(value, list):
        return [_exchanged(one, by) for one in value]
    if isinstance(value, dict):
        return {name: one if name in _NOT_TEXTS else _exchanged(one, by) for name, one in value.items()}
    return value


def _at_original(entity: Mapping[str, Any], scrubbed: Scrubbed) -> dict[str, Any]:
    """The entity where it lies in the text that was sent. Its text is what the model saw of it."""
    start, end = scrubbed.original(entity["start"], entity["end"])
    return {**entity, "start": start, "end": end}
