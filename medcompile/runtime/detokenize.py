"""From a growing list of token ids to a growing text that ends before its stop string.

A character's bytes may lie in several tokens, and a stop string may begin in one token and end in another: what is
not decided yet is held back, so that text once given out is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTEXT = 6
"""Tokens of the prompt before the answer: enough for a decoder to see that the answer does not begin the text."""
_BROKEN = "\ufffd"
_PATIENCE = 8
"""Tokens after which an unfinished character is taken for broken bytes; no character has more than four bytes."""


class TextStream:
    """One answer's text. stopped: the stop string that ended it; more tokens are then not taken.

    prompt: its ids, for the space that a tokenizer leaves out at the beginning of a text only. Special tokens show
    nowhere. What all calls return together is the tokenizer's own decoding of the answer behind that prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""
        # Tokens that may still matter: before _read they are given out already, and stand there as context.
        self._ids = [int(i) for i in prompt[-_CONTEXT:]]
        self._read = len(self._ids)
        self._given = self._decode(self._ids)
        if self._given.endswith(_BROKEN):
            self._ids, self._read, self._given = [], 0, ""

    def push(self, token: int) -> str:
        """The text that this token decides, often its own; "" where it is held back."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._given):  # a special token, or a character's first bytes
            return ""
        if not text.endswith(_BROKEN):
            return self._release(self._advance(text))
        if len(self._ids) - self._read < _PATIENCE:
            return ""
        new, self._given = text[len(self._given) : -1], text[:-1]  # bytes that no next one can mend, but for the last
        return self._release(new)

    def finish(self) -> str:
        """The text held back until now, when no token follows."""
        if self.stopped is not None:
            return ""
        text = self._release(self._advance(self._decode(self._ids)))
        held, self._held = self._held, ""
        return text + held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _advance(self, text: str) -> str:
        """What text has beyond that given out; the tokens of this stretch are context from here on."""
        new = text[len(self._given) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._given = self._decode(self._ids)
        return new

    def _release(self, new: str) -> str:
        """Of the text held and the new one, what no stop string can reach any more."""
        text = self._held + new
        found = min(((text.find(s), s) for s in self._stop if s in text), default=None)
        if found:
            self.stopped, self._held = found[1], ""
            return text[: found[0]]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
