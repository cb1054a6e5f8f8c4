"""From token probabilities to entities with character offsets: label schemes, words, spans.

Understands IOB1, IOB2 (BIO), BIOES and BILOU prefixes, and plain labels without any, where neighbouring words of one
label make one entity. Sequences a scheme forbids are read the way seqeval reads them: an entity starts where its
inside label appears without a beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medcompile.runtime.text import Tokens

Array = np.ndarray[Any, Any]

OUTSIDE = "O"
_STARTS, _SINGLE, _ENDS, _INSIDE = "B", "SU", "EL", "I"


@dataclass(frozen=True)
class Entity:
    """A labelled stretch of text: text == original[start:end], in characters. score: mean over its words, 0 to 1."""

    label: str
    text: str
    start: int
    end: int
    score: float


class LabelScheme:
    """How a model's labels, by id, spell entities. outside: the id of the label that means no entity (0 if none)."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.outside = labels.index(OUTSIDE) if OUTSIDE in labels else 0
        prefixed = all(len(n) > 2 and n[1] == "-" and n[0] in "BIESLU" for n in labels if n != OUTSIDE)
        # (prefix, entity type) by id; outside is ("O", ""), a plain label behaves like an inside one
        self._tags = [
            (OUTSIDE, "") if name == OUTSIDE else (name[0], name[2:]) if prefixed else (_INSIDE, name)
            for name in labels
        ]

    def entities(self, text: str, tokens: Tokens, probabilities: Array) -> list[Entity]:
        """The entities of one text, in order. probabilities: [tokens, labels]."""
        first = first_tokens(tokens)
        last = np.append(first[1:], len(tokens)) - 1
        ids = probabilities[first].argmax(axis=1) if len(first) else []
        found: list[Entity] = []
        words: list[int] = []
        kind = ""

        def close() -> None:
            if words:
                start, end = int(tokens.offsets[first[words[0]], 0]), int(tokens.offsets[last[words[-1]], 1])
                score = np.mean([probabilities[first[w], ids[w]] for w in words])
                found.append(Entity(kind, text[start:end], start, end, float(score)))
                words.clear()

        for word, label in enumerate(ids):
            prefix, this = self._tags[label]
            if prefix == OUTSIDE or this != kind or prefix in _STARTS + _SINGLE:
                close()
            if prefix != OUTSIDE:
                kind = this
                words.append(word)
                if prefix in _SINGLE + _ENDS:
                    close()
        close()
        return found


def first_tokens(tokens: Tokens) -> Array:
    """Indices of the tokens that begin a word, int64 [words that have tokens]."""
    return np.flatnonzero(np.diff(tokens.words, prepend=-1) != 0)
