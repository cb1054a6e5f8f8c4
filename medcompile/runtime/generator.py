"""The face of a decoder: prompts in, answers out, for one caller or for many threads at once.

There is no thread of its own: whoever waits for an answer drives the steps, one at a time, for everybody's requests.
What a step holds is scheduler.py's to decide, what an answer is request.py's, which prompts fit is decided here.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from medcompile.errors import CacheFull, UsageError
from medcompile.runtime.constrained import Grammars
from medcompile.runtime.decoder import StepModel
from medcompile.runtime.detokenize import TextStream
from medcompile.runtime.kv_cache import BlockPool
from medcompile.runtime.prompts import DecoderText, Prompt
from medcompile.runtime.request import Chunk, Completion, Request
from medcompile.runtime.sampling import Row, Sampling, choose
from medcompile.runtime.scheduler import Scheduler, Work, step_batch
from medcompile.runtime.scheduler import Sequence as Tokens
from medcompile.runtime.speculation import Lookup

Array = np.ndarray[Any, Any]


@dataclass
class Stats:
    """Requests and blocks now, and sums since the start. guessed: tokens that steps checked; accepted: the right ones.

    computed: tokens that went through the model, guessed ones aside; cached: those of prompts that needed not to.
    """

    waiting: int = 0
    running: int = 0
    blocks: int = 0
    free_blocks: int = 0
    preemptions: int = 0
    steps: int = 0
    computed: int = 0
    cached: int = 0
    generated: int = 0
    guessed: int = 0
    accepted: int = 0


STEP_TOKENS, REQUESTS = 256, 128
"""Of a step at most, unless a model takes less."""


class Generator:
    """Generates with one model, for any number of requests at once; threads may share it.

    step_tokens: tokens in one step at most; long prompts are computed in chunks of what the others leave of it.
    requests: at most so many run at once, the others wait. guess: tokens guessed ahead for a sequence at most
    (speculation.py); 0 is none. cheap_tokens: a step of so many tokens takes about as long as one of a single token.
    ageing: steps of waiting that make up for one level of priority.
    """

    def __init__(
        self,
        model: StepModel,
        text: DecoderText,
        *,
        step_tokens: int = STEP_TOKENS,
        requests: int = REQUESTS,
        guess: int = 8,
        cheap_tokens: int = 4,
        ageing: int = 500,
    ) -> None:
        if not 0 < requests <= step_tokens:
            raise UsageError(
                f"requests is {requests} and step_tokens {step_tokens}",
                fix="let a step hold one token at least for each request that runs",
            )
        self.text = text
        self._model = model
        self._guess = guess
        self._scheduler = Scheduler(
            BlockPool(model.blocks, model.block_size),
            step_tokens=step_tokens,
            slots=requests,
            ageing=ageing,
            cheap_tokens=cheap_tokens,
        )
        self._live: dict[Tokens, Request] = {}
        self._changed = threading.Condition()  # guards all of the above, but while the model runs
        self._stepping = False
        self._closed = False
        self._sums = Stats()

    # ---- for callers that wait

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[Completion]:
        """The answers, in the order of the prompts. A single text is a list of one.

        sampling: one for all, or one each; None is what the checkpoint asks for. See submit() for the rest.
        """
        each: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        samplings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(each)
        if len(samplings) != len(each):
            raise UsageError(f"{len(each)} prompts, {len(samplings)} samplings", fix="give one for all, or one each")
        requests: list[Request] = []
        try:
            for prompt, its in zip(each, samplings, strict=True):
                requests.append(self.submit(prompt, its, priority=priority, cache_salt=cache_salt))
            for request in requests:
                while request.finish_reason is None:
                    self._advance(request)
            return [request.completion() for request in requests]
        finally:
            for request in requests:
                self.cancel(request)

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, priority: int = 0, cache_salt: str = ""
    ) -> Iterator[Chunk]:
        """The answer chunk by chunk. What is wrong with the prompt shows at once; nothing runs before the first next().

        Closing the iterator cancels.
        """
        return self.chunks(self._request(prompt, sampling, cache_salt), priority=priority)

    # ---- for servers

    def submit(
        self, prompt: Prompt, sampling: Sampling | None = None, *, priority: int = 0, cache_salt: str = ""
    ) -> Request:
        """Let a request wait for its turn. Read it with chunks(), or drive step() and read its news.

        priority: a smaller one goes first. cache_salt: only requests of the same salt share computed tokens, so that
        nobody can learn by timing what others asked. Raises InputError for a prompt that the model's window can't
        hold, CacheFull for a request that the pool never could.
        """
        request = self._request(prompt, sampling, cache_salt)
        self._enter(request, priority)
        return request

    def chunks(self, request: Request, *, priority: int = 0) -> Iterator[Chunk]:
        """A request's chunks as they come; one that was not submitted yet is, at the first. One reader a request."""
        try:
            if request.sequence not in self._live and request.finish_reason is None:
                self._enter(request, priority)
            while request.finish_reason is None or request.news:  # in this order: news come before the reason
                if not request.news:
                    self._advance(request)
                    continue
                chunk = request.news.popleft()
                if request.error:
                    raise request.error
                yield chunk
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """End it now; its blocks are free at once. Nothing happens to one that is done."""
        with self._changed:
            if self._live.pop(request.sequence, None) is not None:
                self._scheduler.remove(request.sequence)
                request.finish("cancelled")
                self._changed.notify_all()

    def step(self) -> bool:
        """One step of the model, for all that run. False if there was nothing to do.

        Waits while another thread steps. An error of the model leaves everything as before the step.
        """
        with self._changed:
            while self._stepping:
                self._changed.wait()
            works = self._scheduler.plan()
            if not works:
                return False
            batch = step_batch(works, self._model.block_size)
            copies = [w.sequence.copy for w in works if w.sequence.copy]
            requests = [self._live[w.sequence] for w in works]
            self._stepping = True
        try:  # without the lock: others submit and cancel meanwhile; blocks that they free are given out only above
            if copies:
                self._model.copy_blocks(copies)
            logits = self._model.step(batch)
            rows: list[Row] = []
            for request, work in zip(requests, works, strict=True):
                if work.ends:
                    rows += request.rows(work.draft)
            chosen = choose(logits, rows) if rows else np.zeros(0, np.int64)
            with self._changed:
                self._settle(works, requests, chosen, logits)
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()
        return True

    @property
    def stats(self) -> Stats:
        with self._changed:
            s, pool = self._scheduler, self._scheduler.pool
            now = {"waiting": len(s.waiting), "running": len(s.running), "preemptions": s.preemptions}
            return replace(self._sums, **now, blocks=pool.blocks, free_blocks=pool.free)

    def close(self) -> None:
        """Cancel what is left and close the model."""
        with self._changed:
            self._closed = True
            for request in list(self._live.values()):
                self.cancel(request)
            while self._stepping:
                self._changed.wait()
        self._model.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.text.tokenizer, self._model.vocabulary, self.text.end_ids)

    def _request(self, prompt: Prompt, sampling: Sampling | None, cache_salt: str) -> Request:
        """A request that nobody knows of yet. Its buffer is as long as it may become."""
        s = sampling or self.text.sampling
        ids = self.text.encode(prompt, self._model.vocabulary)
        size, blocks = self._model.block_size, self._model.blocks
        held = size * blocks + 1 - len(ids)  # the last token of all is never computed, so needs no place
        tokens = min(self.text.room(ids), s.max_tokens if s.max_tokens is not None else max(1, held))
        if tokens > held:
            raise CacheFull(
                f"{len(ids)} tokens of prompt and up to {tokens} of answer need "
                f"{self._scheduler.blocks_for(len(ids) + tokens - 1)} blocks of {size}; the pool has {blocks}",
                fix="lower max_tokens, shorten the prompt, or load the model with a larger pool",
            )
        buffer = np.zeros(len(ids) + tokens, np.int64)
        buffer[: len(ids)] = ids
        asked = s.response_format
        constraint = self._grammars.constraint(asked) if asked and asked.get("type") != "text" else None
        return Request(
            Tokens(buffer, len(ids), salt=cache_salt, lookup=Lookup(self._guess) if self._guess else None),
            s,
            secrets.randbits(64) if s.seed is None else s.seed,
            frozenset(s.stop_ids) | frozenset(() if s.ignore_eos else self.text.end_ids),
            TextStream(self.text.tokenizer, ids[-8:].tolist(), tuple(s.stop)),
            constraint,
        )

    def _enter(self, request: Request, priority: int) -> None:
        with self._changed:
            if self._closed:
                raise UsageError("this generator is closed", fix="load the bundle again")
            self._live[request.sequence] = request
            self._scheduler.add(request.sequence, priority)
            self._changed.notify_all()

    def _advance(self, request: Request) -> None:
        """Bring the request on: step, or wait for the one who does."""
        with self._changed:
            if self._stepping:
                self._changed.wait()
                return
        if request.finish_reason is None:
            self.step()

    def _settle(self, works: Sequence[Work], requests: Sequence[Request], chosen: Array, logits: Array) -> None:
        """Book a step that was computed, and end the answers that it completed."""
        at, sums = 0, self._sums
        sums.steps += 1
        for work, request in zip(works, requests, strict=True):
            rows = slice(at, at + (len(work.draft) + 1 if work.ends else 0))
            at = rows.stop
            s = work.sequence
            if s not in self._live:
                continue
            first = s.length == s.prompt_length
            taken = request.take(work.draft, chosen[rows], logits[rows]) if work.ends else 0
            tokens = chosen[rows][:taken]
            if s.lookup:
                s.lookup.learn(work.guess, tokens)
            self._scheduler.commit(work, tokens)
            sums.computed += work.count
            sums.cached += s.cached if work.ends and first else 0
            sums.generated += taken
            sums.guessed += len(work.draft)
            sums.accepted += max(0, taken - 1)
            if request.finish_reason is not None:
                del self._live[s]
                self._scheduler.remove(s)
