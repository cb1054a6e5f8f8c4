"""From logits to tokens: what a request asks for, the penalties, the cuts, the draw.

A row of logits is dealt with as follows, each step only where asked for: tokens that the grammar forbids go;
repetition, then frequency and presence penalties; at temperature 0 the largest wins; else temperature, top_k, top_p,
min_p, and a draw. Penalties mean what they mean in vLLM, the cuts and their order what they mean in transformers.
The draw takes one random number, a keyed hash of the request's seed and of the token's position, so that what else
is in the batch, preemption and speculation don't change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from medcompile.errors import BackendError, UsageError

Array = np.ndarray[Any, Any]

_CHUNK = 64
_RANGES: Mapping[str, tuple[float, float, str]] = {  # lowest, highest, what to give instead
    "temperature": (0, 100, "0 for the most probable token each time, else up to 2 or so"),
    "top_k": (0, 2**31, "0 keeps every token"),
    "top_p": (0, 1, "a share above 0 and up to 1; 1 keeps every token"),
    "min_p": (0, 1, "a share from 0 to 1; 0 keeps every token"),
    "repetition_penalty": (0, 100, "1 changes nothing, 1.1 is usual"),
    "presence_penalty": (-100, 100, "0 changes nothing; -2 to 2 is usual"),
    "frequency_penalty": (-100, 100, "0 changes nothing; -2 to 2 is usual"),
}


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen, and when it ends.

    max_tokens: new tokens at most; None is as many as the model's window and the pool of blocks hold.
    temperature: 0 is greedy. top_k: the k most probable (and any as probable as the last of them); 0 is all.
    top_p: the fewest most probable tokens that together reach this share. min_p: those at least min_p times as
    probable as the most probable one. repetition_penalty: positive logits of tokens in the prompt or the answer are
    divided by it, negative ones multiplied. presence_penalty: taken off the logit of every token in the answer;
    frequency_penalty: the same, times how often it stands there.
    seed: with the same one, the same prompt gives the same answer; None draws one.
    stop: strings that end the answer, which then ends before them. stop_ids: tokens that do, beside the model's own.
    logprobs: None is none; n gives each token's natural log probability by the model itself (before penalties,
    temperature and cuts) and those of the n most probable. ignore_eos: the model's own end tokens don't end it.
    response_format: as in OpenAI's interface, what constrained.py takes; None is free text.
    Raises UsageError.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        for name, (low, high, advice) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and low <= value <= high
            if not number or (value == 0 and name in {"top_p", "repetition_penalty"}):
                raise UsageError(f"{name} is {value!r}", fix=f"give {advice}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}", fix="give at least 1, or None for no limit of yours")
        if self.logprobs is not None and not 0 <= self.logprobs <= 100:
            raise UsageError(f"logprobs is {self.logprobs}", fix="ask for 0 to 100 alternatives, or None for none")
        if not all(self.stop):
            raise UsageError("an empty stop string would end every answer at once", fix="leave it out")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UsageError(f"seed is {self.seed}", fix="give 0 to 2**64 - 1")

    @property
    def plain(self) -> bool:
        """True where the largest logit wins and nothing changes the logits before."""
        return self.temperature == 0 and not self.penalized

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class TokenLogprob(NamedTuple):
    """A token's natural log probability, and the most probable tokens there with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Row:
    """What choosing one token needs beside its logits. history: int64, prompt and all that came after it so far.

    allowed: bool [vocabulary], or None for all.
    """

    sampling: Sampling
    seed: int
    history: Array
    prompt_length: int
    allowed: Array | None = None


def choose(logits: Array, rows: Sequence[Row]) -> Array:
    """One token for each row, int64 [rows]. logits: float32 [rows, vocabulary], left as they are.

    Raises BackendError where a row holds NaN: whatever was chosen would be noise.
    """
    tokens = logits.argmax(axis=1)  # of a row with NaN, the first of them
    if np.isnan(logits[np.arange(len(rows)), tokens]).any():
        raise BackendError("the model gave NaN logits", fix="build with float: float32, or verify the bundle")
    for i, row in enumerate(rows):
        if row.allowed is not None or not row.sampling.plain:
            tokens[i] = _choose(logits[i], row)
    return np.asarray(tokens)


def logprob(logits: Array, token: int, top: int) -> TokenLogprob:
    """Of one row of raw logits, float32 [vocabulary]."""
    shift = logits.max()
    norm = float(shift) + float(np.log(np.exp(logits - shift).sum(dtype=np.float64)))
    best = _largest(logits, top) if top else np.zeros(0, np.int64)
    best = best[np.argsort(-logits[best], kind="stable")][:top]
    return TokenLogprob(token, float(logits[token]) - norm, tuple((int(i), float(logits[i]) - norm) for i in best))


def uniform(seed: int, position: int) -> float:
    """A number from 0 up to 1 (never 1), fixed by seed and position: a keyed hash costs a tenth of a new Philox."""
    digest = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _choose(raw: Array, row: Row) -> int:
    s = row.sampling
    logits = raw if row.allowed is None else np.where(row.allowed, raw, np.float32(-np.inf))
    if s.penalized:
        logits = penalize(logits, row)
    if s.temperature == 0:
        return int(logits.argmax())
    ids, weights = kept(logits, s)
    at = _draw(weights, uniform(row.seed, len(row.history)))
    return at if ids is None else int(ids[at])


def penalize(logits: Array, row: Row) -> Array:
    """A changed copy of one row."""
    s = row.sampling
    logits = logits.copy()
    if s.repetition_penalty != 1:
        old = logits[row.history]
        logits[row.history] = np.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        counts = np.bincount(row.history[row.prompt_length :])
        ids = np.flatnonzero(counts)
        logits[ids] -= (s.frequency_penalty * counts[ids] + s.presence_penalty).astype(np.float32)
    return logits


def kept(logits: Array, s: Sampling) -> tuple[Array | None, Array]:
    """The tokens that one may draw (ids ascending; None is all of them), and their weights, which sum to any total."""
    ids = _largest(logits, s.top_k) if 0 < s.top_k < len(logits) else None
    values = logits if ids is None else logits[ids]
    weights = np.exp((values - values.max()) / np.float32(s.temperature))  # 1 is the largest
    if s.top_p < 1:
        nucleus = _nucleus(weights, s.top_p)
        ids = nucleus if ids is None else ids[nucleus]
        weights = weights[nucleus]
    if s.min_p > 0:
        likely = np.flatnonzero(weights >= s.min_p)
        ids = likely if ids is None else ids[likely]
        weights = weights[likely]
    return ids, weights


def _largest(values: Array, count: int) -> Array:
    """Indices, ascending, of the values not below the count-th largest: count of them, or more where some are equal.

    The count-th largest of the chunks' peaks is never above it, and few values are not below that: a partition of
    all of them costs ten times as much.
    """
    if count >= len(values):
        return np.arange(len(values))
    peaks = np.maximum.reduceat(values, np.arange(0, len(values), _CHUNK))
    near = np.arange(len(values))
    if count <= len(peaks):
        near = np.flatnonzero(values >= np.partition(peaks, -count)[-count])
    found = values[near]
    return np.asarray(near[found >= np.partition(found, -count)[-count]])


def _nucleus(weights: Array, share: float) -> Array:
    """Indices, ascending, of the fewest largest weights that together reach this share of the total.

    Of equal weights at the edge those of lower index. Weights are looked at from the largest (1) down, a few e-folds
    at a time, so that only about as many as stay are ever sorted.
    """
    goal = share * weights.sum(dtype=np.float64)
    floor = 0.25
    near = np.flatnonzero(weights >= floor)
    while floor and weights[near].sum(dtype=np.float64) < goal:
        floor /= 8
        near = np.flatnonzero(weights >= floor)
    found = weights[near]
    falling = np.sort(found)[::-1]
    size = min(int(np.searchsorted(np.cumsum(falling, dtype=np.float64), goal)) + 1, len(near))
    edge = falling[size - 1]
    above = found > edge
    above[np.flatnonzero(found == edge)[: size - int(above.sum())]] = True
    return np.asarray(near[above])


def _draw(weights: Array, number: float) -> int:
    """The index at which the running sum passes number times the total: first the chunk, then the place in it."""
    starts = np.arange(0, len(weights), _CHUNK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    goal = number * sums[-1]
    chunk = int(np.searchsorted(sums, goal, side="right"))
    start = int(starts[chunk])
    inside = np.cumsum(weights[start : start + _CHUNK], dtype=np.float64)
    at = int(np.searchsorted(inside, goal - (sums[chunk - 1] if chunk else 0.0), side="right"))
    if at == len(inside):  # rounding: the chunk's sum and its running sum differ in the last bit
        at = int(np.flatnonzero(weights[start : start + _CHUNK])[-1])
    return start + at
