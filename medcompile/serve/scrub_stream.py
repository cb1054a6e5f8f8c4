"""Scrubbing of a text that is still being written: nothing goes out before what follows can no longer change it.

Held back is what an identifier could still begin or go on in: the last HELD characters, back to a space, and all of an
identifier that reaches into them. What comes out is, put together, the scrubbed text.
"""

from __future__ import annotations

from medcompile.serve.scrub import Scrubber, replace

HELD = 96
"""Characters; longer than what any pattern needs to its left or right, names with their labels included."""


class ScrubbedStream:
    """One text, in pieces: feed() gives what may go out by now, finish() the rest."""

    def __init__(self, scrubber: Scrubber) -> None:
        self._scrubber = scrubber
        self._before = ""  # went out already; patterns look back at it
        self._held = ""

    def feed(self, piece: str) -> str:
        self._held += piece
        if len(self._held) < 2 * HELD:
            return ""
        return self._out(len(self._held) - HELD)

    def finish(self) -> str:
        return self._out(len(self._held))

    def _out(self, upto: int) -> str:
        """The scrubbed text up to about there: before a space, and not within an identifier."""
        text = self._before + self._held
        begin = len(self._before)
        found = self._scrubber.find(text)
        end = begin + upto
        if end < len(text):
            end = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end), begin)
            for start, stop, _ in reversed(found):
                if start < end <= stop:  # one that ends just here may still grow
                    end = max(start, begin)
        spans = [(max(s, begin) - begin, min(e, end) - begin, kind) for s, e, kind in found if s < end and e > begin]
        told = replace(text[begin:end], spans).text
        self._before, self._held = text[:end][-HELD:], text[end:]
        return told
