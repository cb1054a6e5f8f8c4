"""Decoders in a worker: every request joins the runtime's continuous batch, and one thread drives its steps.

An answer that is streamed is told after each step, all answers of a step in one write; one that is not is told whole.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from medcompile.errors import InputError, MedcompileError
from medcompile.runtime.deadlines import Priority
from medcompile.runtime.request import Chunk, Request
from medcompile.runtime.sampling import Sampling, TokenLogprob
from medcompile.runtime.session import Session
from medcompile.serve.desk import Desk, Line, unknown
from medcompile.serve.frames import Frame

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("medcompile.serve.worker")

TURNS: Mapping[str, int] = {Priority.EMERGENCY: 0, Priority.ROUTINE: 1, Priority.BACKGROUND: 2}
"""The generator's priorities: smaller goes first, and waiting makes up for it."""
CHARACTERS = 64
"""Of one token, at most."""
SCHEMA_WORDS = frozenset(
    {
        *("$ref", "$defs", "definitions", "type", "enum", "const", "properties", "required", "additionalProperties"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "items", "prefixItems", "contains"),
        *("minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum"),
        *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf", "oneOf", "not", "if", "then", "else"),
        *("unevaluatedProperties", "dependentSchemas", "dependentRequired", "unsatisfiable", "recursive", "regex"),
    }
)
"""Words of JSON Schema, and of what is said about one."""


@dataclass
class Ticket:
    """One answer of a job, on its way. text, tokens, logprobs: what is not told yet."""

    job: Job
    index: int
    request: Request
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Job:
    """A request: some prompts, n answers to each."""

    number: int
    n: int
    streamed: bool
    arrived_s: float
    left: int
    tickets: list[Ticket] = field(default_factory=list)
    started_s: float | None = None
    first_s: float | None = None
    last_s: float = 0.0


class DecoderDesk(Desk):
    def __init__(self, session: Session, line: Line) -> None:
        self._session = session
        self._generator = session.generator
        self._text = session.generator.text
        template = session.bundle.root / "assets" / "chat_template.jinja"
        self._template = template.read_text(encoding="utf-8") if template.is_file() else ""
        self._line = line
        self._words = Words(self._text.tokenizer)
        self._changed = threading.Condition()
        self._jobs: dict[int, Job] = {}
        self._sums = {"busy_s": 0.0}
        self._sizes: Counter[int] = Counter()  # requests in a step
        self._running_since_s: float | None = None
        self._warm_up()
        threading.Thread(target=self._drive, name="medcompile-steps", daemon=True).start()

    def facts(self) -> dict[str, Any]:
        return {"window": self._text.window, "chat": self._text.template is not None}

    def stats(self) -> dict[str, Any]:
        with self._changed:
            jobs = len(self._jobs)
        since_s = self._running_since_s
        now: dict[str, Any] = {"requests": jobs, "busy_for_s": time.monotonic() - since_s if since_s else 0.0}
        now["sizes"] = dict(self._sizes)
        return {**asdict(self._generator.stats), **self._sums, **now}

    def cancel(self, number: int) -> None:
        with self._changed:
            job = self._jobs.pop(number, None)
        for ticket in job.tickets if job else ():
            self._generator.cancel(ticket.request)

    def close(self) -> None:
        self._generator.close()

    def take(self, frame: Frame, *, alone: bool) -> None:
        h = frame.header
        if h["op"] != "generate":
            raise unknown(h["op"], self._session)
        prompts, n = h["prompts"], h["n"]
        for prompt in prompts:
            self._check_size(prompt)
        job = Job(h["id"], n, h["stream"], time.monotonic(), len(prompts) * n)
        samplings = self._samplings(h["sampling"], n)
        try:
            for p, prompt in enumerate(prompts):
                for i, sampling in enumerate(samplings):
                    request = self._generator.submit(
                        prompt, sampling, priority=TURNS[h["priority"]], cache_salt=h["salt"]
                    )
                    job.tickets.append(Ticket(job, p * n + i, request))
        except Exception as error:
            for ticket in job.tickets:
                self._generator.cancel(ticket.request)
            if isinstance(error, InputError):
                raise discreet(error, self._template) from None
            raise
        told: dict[str, Any] = {"id": job.number, "more": True}
        told["prompt_tokens"] = [t.request.sequence.prompt_length for t in job.tickets[::n]]
        if h.get("echo"):
            told["echo"] = [p if isinstance(p, str) else self._text.tokenizer.decode(p) for p in prompts]
        self._line.send((told, b""))
        with self._changed:
            self._jobs[job.number] = job
            self._changed.notify_all()

    def _check_size(self, prompt: Any) -> None:
        """Turn away what is beyond all windows before it is tokenized, which would keep the others waiting."""
        size = (
            len(prompt)
            if isinstance(prompt, str)
            else sum(len(str(m.get("content", ""))) for m in prompt if isinstance(m, dict))
        )
        if size > self._text.window * CHARACTERS:
            raise InputError(
                f"a prompt of {size} characters; the model's window is {self._text.window} tokens, answer included",
                fix="shorten the prompt",
            )

    def _samplings(self, asked: Mapping[str, Any], n: int) -> list[Sampling]:
        """One for each of n answers: with a seed each has its own, so that they differ, and are the same next time."""
        sampling = replace(self._text.sampling, **asked)
        if sampling.seed is None:
            return [sampling] * n
        return [replace(sampling, seed=(sampling.seed + i) % 2**64) for i in range(n)]

    # ---- steps

    def _drive(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    self._changed.wait()
            self._running_since_s = started_s = time.monotonic()
            try:
                self._generator.step()
            except Exception as error:  # noqa: BLE001  # whose request it was can't be told, so it ends them all
                self._fail_all(error)
            self._running_since_s = None
            self._sizes[max(1, self._generator.stats.running)] += 1
            self._sums["busy_s"] += time.monotonic() - started_s
            self._tell()

    def _fail_all(self, error: Exception) -> None:
        if not isinstance(error, MedcompileError):
            log.error("a step failed", exc_info=error)
        with self._changed:
            jobs = list(self._jobs.values())
        for job in jobs:
            self.cancel(job.number)
            self._line.fail(job.number, error)

    def _tell(self) -> None:
        """What the step brought, in one write."""
        now_s = time.monotonic()
        with self._changed:
            jobs = list(self._jobs.values())
        frames: list[tuple[Mapping[str, Any], bytes]] = []
        for job in jobs:
            for ticket in job.tickets:
                if job.started_s is None and ticket.request.sequence.blocks:
                    job.started_s = now_s
                if ticket.request.news:
                    frames += self._news(ticket, now_s)
        if frames:
            self._line.send(*frames)

    def _news(self, ticket: Ticket, now_s: float) -> list[tuple[Mapping[str, Any], bytes]]:
        """The frames that a ticket's new chunks make. The job's last one says so."""
        job, request = ticket.job, ticket.request
        reason = None
        while request.news:
            chunk = request.news.popleft()
            self._add(ticket, chunk)
            reason = chunk.finish_reason
        if request.error:
            self.cancel(job.number)
            self._line.fail(job.number, request.error)
            return []
        job.started_s = job.started_s or now_s
        job.first_s = job.first_s or now_s
        job.last_s = now_s
        if reason:
            job.left -= 1
        if job.left == 0:
            with self._changed:
                self._jobs.pop(job.number, None)
        elif not job.streamed:
            return []
        tickets = [ticket] if job.streamed else job.tickets
        told: dict[str, Any] = {"id": job.number, "more": job.left > 0, "choices": [self._told(t) for t in tickets]}
        if job.left == 0:
            told |= {
                "queued_s": job.started_s - job.arrived_s,
                "first_token_s": job.first_s - job.arrived_s,
                "decode_s": job.last_s - job.first_s,
                "cached_tokens": sum(t.request.sequence.cached for t in job.tickets[:: job.n]),
            }
        return [(told, b"")]

    def _add(self, ticket: Ticket, chunk: Chunk) -> None:
        ticket.text.append(chunk.text)
        ticket.tokens += len(chunk.token_ids)
        ticket.logprobs += map(self._words.told, chunk.logprobs)

    def _told(self, ticket: Ticket) -> dict[str, Any]:
        told: dict[str, Any] = {"index": ticket.index, "text": "".join(ticket.text), "tokens": ticket.tokens}
        if ticket.logprobs:
            told["logprobs"] = ticket.logprobs
        if ticket.request.finish_reason:
            told["finish_reason"] = ticket.request.finish_reason
        ticket.text, ticket.tokens, ticket.logprobs = [], 0, []
        return told

    def _warm_up(self) -> None:
        """A first step, in which libraries make what they make once."""
        self._generator.generate([[0]], Sampling(max_tokens=1, ignore_eos=True))


def discreet(error: InputError, template: str) -> InputError:
    """The error without what was sent: a schema, an expression or a conversation may hold a name.

    Of a chat template's refusal its own words are kept, of a schema's the keywords that it is about.
    """
    what, colon, why = error.message.partition(": ")
    if not colon or not what.startswith(("response_format", "the chat template")):
        return error
    if what.startswith("the chat template"):
        return InputError(f"{what}: {why}" if why in template else what, fix=error.fix)
    about = sorted(word for word in SCHEMA_WORDS if re.search(rf"\b{re.escape(word)}\b", why))
    return InputError(f"{what}; look at: {', '.join(about)}" if about else what, fix=error.fix)


class Words:
    """What a token stands for alone, as logprobs tell it: text, and bytes where these are no whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
        self.word = lru_cache(1 << 16)(self._word)

    def told(self, one: TokenLogprob) -> dict[str, Any]:
        text, raw = self.word(one.token_id)
        top = [(*self.word(i), p) for i, p in one.top]
        return {
            "token": text,
            "logprob": one.logprob,
            "bytes": raw,
            "top_logprobs": [{"token": t, "logprob": p, "bytes": b} for t, b, p in top],
        }

    def _word(self, token: int) -> tuple[str, list[int]]:
        name = self._tokenizer.id_to_token(token)
        if name is None:  # the model's table is larger than the tokenizer's
            return "", []
        if self._byte_level and all(c in _BYTES for c in name):
            raw = bytes(_BYTES[c] for c in name)
        elif len(name) == 6 and name.startswith("<0x"):
            raw = bytes([int(name[3:5], 16)])
        else:
            raw = (name if self._byte_level else name.replace("\u2581", " ")).encode()
        return raw.decode("utf-8", "replace"), list(raw)


def _byte_names() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as. Source: GPT-2's encoder.py, bytes_to_unicode."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_names()
