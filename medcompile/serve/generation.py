"""The calls of decoders: chat and completions, whole or streamed, in OpenAI's shapes.

What a client left out is as the checkpoint asks to be used. Parameters that would change the answer and can't be
honoured are refused by name.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from medcompile.serve import schemas
from medcompile.serve.asked import Asked
from medcompile.serve.engine import Engine
from medcompile.serve.engines import Engines
from medcompile.serve.failures import BadRequest, NotSupported, TooLarge
from medcompile.serve.frames import Frame

Answer = dict[str, Any] | AsyncGenerator[dict[str, Any], None]

_SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_STOPS = 16
ANSWERS = 256
"""Of one request, at most: prompts times n."""


@dataclass
class Run:
    """One request under way: its frames after the first, and what every piece of its answer says."""

    engine: Engine
    frames: AsyncGenerator[Frame, None]
    asked: Asked
    head: Mapping[str, Any]
    prompt_tokens: list[int]
    echo: list[str]
    n: int
    usage: dict[str, Any] = field(default_factory=dict)

    async def said(self) -> AsyncGenerator[dict[str, Any], None]:
        """Each choice's news. After the last, usage and the tally are there."""
        async with aclosing(self.frames) as frames:
            async for frame in frames:
                for choice in frame.header["choices"]:
                    self.asked.tally.tokens_out += choice["tokens"]
                    yield choice
                if not frame.header["more"]:
                    self._settle(frame.header)

    def _settle(self, told: Mapping[str, Any]) -> None:
        tally, prompt = self.asked.tally, sum(self.prompt_tokens)
        tally.queued_s, tally.first_token_s = told["queued_s"], told["first_token_s"]
        tally.decode_s, tally.cached_tokens = told["decode_s"], told["cached_tokens"]
        self.usage = {
            "prompt_tokens": prompt,
            "completion_tokens": tally.tokens_out,
            "total_tokens": prompt + tally.tokens_out,
            "prompt_tokens_details": {"cached_tokens": tally.cached_tokens},
        }


async def chat(engines: Engines, body: schemas.ChatRequest, asked: Asked) -> Answer:
    """/v1/chat/completions: answers to a conversation, by the model's own chat template."""
    _refuse(body, tools=body.tools, logit_bias=body.logit_bias)
    if body.modalities not in (None, ["text"]):
        raise NotSupported("modalities other than text", fix="leave it out", param="modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs without logprobs", fix="set logprobs to true", param="top_logprobs")
    sampling = _sampling(body)
    limit = body.max_completion_tokens or body.max_tokens
    if limit is not None:
        sampling["max_tokens"] = limit
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    run = await _begun(engines, body, asked, [[_message(m) for m in body.messages]], sampling, "chatcmpl")
    return _chat_stream(run, body) if body.stream else await _chat_whole(run)


async def complete(engines: Engines, body: schemas.CompletionRequest, asked: Asked) -> Answer:
    """/v1/completions: what follows texts or token ids, as they are."""
    _refuse(body, suffix=body.suffix, logit_bias=body.logit_bias)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise NotSupported("best_of other than n", fix="leave it out", param="best_of")
    if body.echo and body.logprobs is not None:
        raise NotSupported("echo together with logprobs", fix="ask for one of them", param="echo")
    sampling = _sampling(body)
    if body.max_tokens is not None:
        sampling["max_tokens"] = body.max_tokens
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    run = await _begun(engines, body, asked, _prompts(body.prompt), sampling, "cmpl", echo=bool(body.echo))
    return _text_stream(run, body) if body.stream else await _text_whole(run)


# ---- the request


async def _begun(
    engines: Engines,
    body: schemas.Sampled,
    asked: Asked,
    prompts: Sequence[Any],
    sampling: Mapping[str, Any],
    kind: str,
    *,
    echo: bool = False,
) -> Run:
    """Send it, and wait until the model has taken it: what is wrong with a prompt is raised here."""
    engine, n = engines.get(body.model), body.n or 1
    if not prompts:
        raise BadRequest("no prompt", fix="send at least one", param="prompt")
    if len(prompts) * n > ANSWERS:
        raise TooLarge(f"{len(prompts) * n} answers of one request; the limit is {ANSWERS}", param="n")
    if body.stream_options and not body.stream:
        raise BadRequest("stream_options without stream", fix="set stream to true", param="stream_options")
    asked.tally.met(engine, len(prompts) * n)
    salt = f"{asked.caller}\n{body.cache_salt or ''}" if asked.caller or body.cache_salt else ""
    payload = {
        "prompts": prompts,
        "n": n,
        "sampling": sampling,
        "stream": bool(body.stream),
        "salt": salt,
        "echo": echo,
    }
    asked.priority = body.priority or asked.priority
    frames = engine.stream("generate", payload, priority=asked.priority, timeout_s=asked.timeout_s)
    accepted = (await anext(frames)).header
    asked.tally.tokens_in = sum(accepted["prompt_tokens"])
    head = {
        "id": f"{kind}-{asked.request_id or secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": engine.name,
        "system_fingerprint": f"fp_{engine.digest[:12]}",
    }
    return Run(engine, frames, asked, head, accepted["prompt_tokens"], accepted.get("echo", []), n)


def _refuse(body: schemas.Sampled, **given: Any) -> None:
    """Parameters that must be empty here."""
    for name, value in given.items():
        if value:
            raise NotSupported(f"{name} is not supported", fix="leave it out", param=name)


def _sampling(body: schemas.Sampled) -> dict[str, Any]:
    """The fields of Sampling that were asked for."""
    found = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > _STOPS or not all(stop):
        raise BadRequest(f"stop takes up to {_STOPS} strings, none of them empty", fix="send fewer", param="stop")
    if stop:
        found["stop"] = stop
    if body.stop_token_ids:
        found["stop_ids"] = body.stop_token_ids
    if body.seed is not None:
        found["seed"] = body.seed % 2**64
    if body.ignore_eos:
        found["ignore_eos"] = True
    if body.response_format and body.response_format.type != "text":
        found["response_format"] = body.response_format.model_dump(by_alias=True, exclude_none=True)
    return found


def _message(message: schemas.Message) -> dict[str, Any]:
    told = message.model_dump(exclude_none=True)
    if not isinstance(message.content, str):
        told["content"] = "".join(part.text for part in message.content or ())
    return told


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


# ---- chat's answers


async def _chat_whole(run: Run) -> dict[str, Any]:
    choices = []
    async for said in run.said():
        message = {"role": "assistant", "content": said["text"], "refusal": None}
        logprobs = {"content": said["logprobs"], "refusal": None} if "logprobs" in said else None
        choices.append(
            {"index": said["index"], "message": message, "logprobs": logprobs, "finish_reason": said["finish_reason"]}
        )
    return {**run.head, "object": "chat.completion", "choices": choices, "usage": run.usage}


async def _chat_stream(run: Run, body: schemas.ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = {**run.head, "object": "chat.completion.chunk", **({"usage": None} if with_usage else {})}

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    async with aclosing(run.said()) as pieces:
        for index in range(run.n):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for said in pieces:
            if said["text"] or "logprobs" in said:
                logprobs = {"content": said["logprobs"], "refusal": None} if "logprobs" in said else None
                yield chunk(said["index"], {"content": said["text"]}, None, logprobs)
            if said.get("finish_reason"):
                yield chunk(said["index"], {}, said["finish_reason"])
    if with_usage:
        yield {**head, "choices": [], "usage": run.usage}


# ---- completions' answers


async def _text_whole(run: Run) -> dict[str, Any]:
    choices = []
    async for said in run.said():
        before = run.echo[said["index"] // run.n] if run.echo else ""
        logprobs = _legacy(said["logprobs"], 0) if "logprobs" in said else None
        reason = said["finish_reason"]
        choices.append(
            {"index": said["index"], "text": before + said["text"], "logprobs": logprobs, "finish_reason": reason}
        )
    return {**run.head, "object": "text_completion", "choices": choices, "usage": run.usage}


async def _text_stream(run: Run, body: schemas.CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = {**run.head, "object": "text_completion", **({"usage": None} if with_usage else {})}
    offsets = [0] * (len(run.prompt_tokens) * run.n)

    def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]}

    async with aclosing(run.said()) as pieces:
        for i, text in enumerate(run.echo):
            for index in range(i * run.n, (i + 1) * run.n):
                yield chunk(index, text)
        async for said in pieces:
            index, reason = said["index"], said.get("finish_reason")
            logprobs = None
            if "logprobs" in said:
                logprobs = _legacy(said["logprobs"], offsets[index])
                offsets[index] += sum(len(one["token"]) for one in said["logprobs"])
            if said["text"] or logprobs or reason:
                yield chunk(index, said["text"], reason, logprobs)
    if with_usage:
        yield {**head, "choices": [], "usage": run.usage}


def _legacy(logprobs: Sequence[Mapping[str, Any]], offset: int) -> dict[str, Any]:
    """The shape that logprobs have in /v1/completions. offset: characters of the answer before these tokens."""
    offsets = []
    for one in logprobs:
        offsets.append(offset)
        offset += len(one["token"])
    return {
        "tokens": [one["token"] for one in logprobs],
        "token_logprobs": [one["logprob"] for one in logprobs],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in logprobs],
        "text_offset": offsets,
    }
