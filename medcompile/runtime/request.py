"""One prompt and its answer as it grows: what each new token means for the text, and when the answer is done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from medcompile.errors import InputError, MedcompileError
from medcompile.runtime.constrained import Constraint
from medcompile.runtime.detokenize import TextStream
from medcompile.runtime.sampling import Row, Sampling, TokenLogprob, logprob
from medcompile.runtime.scheduler import Sequence as Tokens

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Chunk:
    """What one step added to an answer: text that stays as it is, tokens (whose text may come later, or never).

    finish_reason: None until the last chunk, then "stop" (an end token, a stop string, a finished grammar), "length",
    "cancelled" or "error".
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """An answer. text: without special tokens and without what stopped it. token_ids: with them, up to there.

    stop: the end token's id or the stop string. cached_tokens: of the prompt's, those found computed already.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop: int | str | None
    logprobs: tuple[TokenLogprob, ...]
    prompt_tokens: int
    cached_tokens: int = field(compare=False)


class Request:
    """sequence: its tokens, as the scheduler sees them. ends: tokens that end the answer. news: chunks not read yet.

    finish_reason is set after the last chunk is there: readers look at it without a lock.
    """

    def __init__(
        self,
        sequence: Tokens,
        sampling: Sampling,
        seed: int,
        ends: frozenset[int],
        stream: TextStream,
        constraint: Constraint | None,
    ) -> None:
        self.sequence = sequence
        self.sampling = sampling
        self.finish_reason: str | None = None
        self.error: MedcompileError | None = None
        self.news: deque[Chunk] = deque()
        self._seed = seed
        self._ends = ends
        self._stream = stream
        self._constraint = constraint
        self._said: list[Chunk] = []
        self._stop: int | str | None = None
        self._reason: str | None = None  # finish_reason, as soon as it is known

    def rows(self, draft: Array) -> list[Row]:
        """What choosing the next token takes, and the ones after each drafted token."""
        s = self.sequence
        s.buffer[s.length : s.length + len(draft)] = draft  # free room: commit() writes there what was chosen
        masks: list[Array | None] = [None] * (len(draft) + 1)
        if self._constraint:
            try:
                masks = self._constraint.allowed(draft.tolist())
            except InputError as error:
                self.error = error
        return [
            Row(self.sampling, self._seed, s.buffer[: s.length + i], s.prompt_length, mask)
            for i, mask in enumerate(masks)
        ]

    def take(self, draft: Array, chosen: Array, logits: Array) -> int:
        """Add chosen tokens while the draft before them held, and tell the reader. Returns how many.

        chosen: [draft + 1]; logits: [draft + 1, vocabulary], raw.
        """
        if self.error:
            self.finish("error")
            return 0
        text, logprobs = "", []
        count = 0
        for token in chosen.tolist():
            if self.sampling.logprobs is not None:
                logprobs.append(logprob(logits[count], token, self.sampling.logprobs))
            count += 1
            text += self._add(token, count)
            if self._reason or count > len(draft) or token != draft[count - 1]:
                break
        if self._reason and self._stream.stopped is None:
            text += self._stream.finish()
        self._tell(Chunk(text, tuple(chosen[:count].tolist()), tuple(logprobs), self._reason))
        return count

    def _add(self, token: int, count: int) -> str:
        """The text that this token adds. count: tokens that the sequence does not hold yet, with this one."""
        if self._constraint:
            self._constraint.advance(token)
        text = ""
        if token in self._ends:
            self._stop, self._reason = token, "stop"
            return text
        text = self._stream.push(token)
        if self._stream.stopped is not None:
            self._stop, self._reason = self._stream.stopped, "stop"
        elif self._constraint and self._constraint.done:
            self._reason = "stop"
        elif self.sequence.length + count == len(self.sequence.buffer):
            self._reason = "length"
        return text

    def finish(self, reason: str) -> None:
        """End it from outside."""
        self._tell(Chunk(self._stream.finish(), (), (), reason))

    def _tell(self, chunk: Chunk) -> None:
        self.news.append(chunk)
        self._said.append(chunk)
        self.finish_reason = chunk.finish_reason

    def completion(self) -> Completion:
        """The whole answer, once there is a finish_reason. Raises the error that ended it, if one did."""
        assert self.finish_reason
        if self.error:
            raise self.error
        return Completion(
            text="".join(c.text for c in self._said),
            token_ids=tuple(chain.from_iterable(c.token_ids for c in self._said)),
            finish_reason=self.finish_reason,
            stop=self._stop,
            logprobs=tuple(chain.from_iterable(c.logprobs for c in self._said)),
            prompt_tokens=self.sequence.prompt_length,
            cached_tokens=self.sequence.cached,
        )
