"""Guessing a sequence's next tokens from its own text: where its last few stood before, what followed may follow again.

A guess costs a look-up. The model then checks several guessed tokens in one step, and the token chosen at each
position is the one that would have been chosen without guessing (sampling.py draws by seed and position), so a guess
changes how many tokens a step gives and nothing else. Notes, summaries and answers from a text repeat a lot of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_SIZES = (4, 3, 2)
"""Lengths of the runs of tokens that are looked up, tried in this order."""


class Lookup:
    """One sequence's index of its runs of tokens. longest: tokens guessed at most."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.chance = 0.5  # that a guessed token is right, by what was seen lately
        self._after: dict[bytes, int] = {}  # a run's tokens -> the place after its last appearance
        self._indexed = 0

    def guess(self, tokens: Array, limit: int) -> Array:
        """What may follow these tokens, int64 [at most limit]. tokens only ever grow from call to call."""
        for end in range(self._indexed + 1, len(tokens)):  # the run at the very end must not find itself
            for size in _SIZES:
                if end >= size:
                    self._after[tokens[end - size : end].tobytes()] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        count = min(self.longest, limit)
        if count <= 0:
            return tokens[:0]
        for size in _SIZES:
            place = self._after.get(tokens[-size:].tobytes()) if len(tokens) > size else None
            if place is not None:  # what follows there, over again if it ends at once: the sequence is in a loop
                return tokens[place + np.arange(count) % (len(tokens) - place)]
        return tokens[:0]

    def learn(self, guessed: Array, chosen: Array) -> None:
        """Compare a guess with what was chosen at the same places. It need not have been checked by the model."""
        for guess, token in zip(guessed.tolist(), chosen.tolist(), strict=False):
            right = guess == token
            self.chance += 0.2 * (right - self.chance)
            if not right:
                break
