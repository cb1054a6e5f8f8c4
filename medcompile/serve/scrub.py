"""Patients' identifiers out of texts, and back again by offset: "Ann Planted, MRN 12345" -> "[PERSON], MRN [ID]".

    scrubbed = Scrubber().scrub(text)
    scrubbed.text                   what a model may see
    scrubbed.original(start, end)   where in the original an entity lies that was found in it

The finding is presidio-analyzer's: its recognizers and those of phi_patterns.py, a list of names where one is given,
and a spaCy model where one is installed. Nothing is fetched: presidio's default would download a model, and ask for the
list of top-level domains. What it does on a time-out, to go on without the pattern, would let a name through: here a
text that can't be scrubbed in time raises.

This lowers what is disclosed. It is not a de-identification that any law speaks of: names without a sign beside them
are found by a model alone, and by none of them all.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from medcompile.errors import BackendUnavailable, InputError, UsageError
from medcompile.serve.phi_patterns import AGE, DATE, LINK, NUMBER, PERSON, PHONE, PLACE

_LOWEST_SCORE = 0.35
_KINDS = {
    "DATE_TIME": DATE,
    "EMAIL_ADDRESS": "EMAIL",
    "PHONE_NUMBER": PHONE,
    "US_SSN": NUMBER,
    "UK_NHS": NUMBER,
    "CREDIT_CARD": NUMBER,
    "MAC_ADDRESS": NUMBER,
    "IP_ADDRESS": "IP",
}
Finder = Callable[[str], Iterable[tuple[int, int, str]]]
"""Something else that finds identifiers: a text to (start, end, kind)."""


@dataclass(frozen=True)
class Replaced:
    """text[start:end] of the original became new_start to new_end of the scrubbed text: [kind]."""

    start: int
    end: int
    new_start: int
    new_end: int
    kind: str


@dataclass(frozen=True)
class Scrubbed:
    """A text without what was found, and the way back. replaced: in order, none touching another."""

    text: str
    replaced: tuple[Replaced, ...]

    def original(self, start: int, end: int) -> tuple[int, int]:
        """Where text[start:end] comes from. What touches a replacement comes from all that it stands for."""
        return self._back(start, last=False), max(self._back(end, last=True), self._back(start, last=False))

    def touches(self, start: int, end: int) -> bool:
        """Whether any of text[start:end] stands for something else."""
        return any(one.new_start < end and start < one.new_end for one in self.replaced)

    def _back(self, at: int, *, last: bool) -> int:
        number = bisect.bisect_right(self._starts, at) - 1
        if number < 0:
            return at
        one = self.replaced[number]
        if at == one.new_start:
            return one.start
        if at < one.new_end:
            return one.end if last else one.start
        return at + one.end - one.new_end

    @cached_property
    def _starts(self) -> list[int]:
        return [one.new_start for one in self.replaced]


class Scrubber:
    """names: people to find wherever they stand, such as a ward's patients. model: a spaCy model, by its package's name
    or its folder. finders: what finds identifiers besides. Threads may share one.

    Raises BackendUnavailable without the extra [scrub], UsageError for a model that is not installed.
    """

    def __init__(self, *, names: Sequence[str] = (), model: str = "", finders: Sequence[Finder] = ()) -> None:
        try:
            from medcompile.serve.presidio import analyzer
        except ImportError as error:
            raise BackendUnavailable(
                f"scrubbing needs the package {error.name}", fix="pip install 'medcompile[scrub]'"
            ) from error
        self._analyzer = analyzer(names, model)
        self._finders = tuple(finders)

    def scrub(self, text: str) -> Scrubbed:
        """Raises InputError for a text that can't be gone through in time; it is never let through instead."""
        return replace(text, self.find(text))

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """What identifies someone, as (start, end, kind), in order and apart from each other."""
        try:
            results = self._analyzer.analyze(text, "en", score_threshold=_LOWEST_SCORE)
        except TimeoutError:
            raise InputError(
                "a text that can't be scrubbed in time", fix="send it in parts, without long runs of one character"
            ) from None
        found = [(r.start, r.end, _KINDS.get(r.entity_type, r.entity_type)) for r in results]
        for finder in self._finders:
            found += finder(text)
        return united(found)


def united(found: Iterable[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Spans that overlap or touch, as one, of the kind of the longest among them."""
    merged: list[list[tuple[int, int, str]]] = []
    end = -1
    for span in sorted(s for s in found if s[0] < s[1]):
        if merged and span[0] <= end:
            merged[-1].append(span)
        else:
            merged.append([span])
        end = max(end, span[1])
    return [
        (min(s[0] for s in group), max(s[1] for s in group), max(group, key=lambda s: (s[1] - s[0], s[2]))[2])
        for group in merged
    ]


def replace(text: str, spans: Sequence[tuple[int, int, str]]) -> Scrubbed:
    """The text with each span as [KIND]. spans: in order, none touching another."""
    pieces: list[str] = []
    replaced: list[Replaced] = []
    at = length = 0
    for start, end, kind in spans:
        told = f"[{kind}]"
        pieces += (text[at:start], told)
        length += start - at
        replaced.append(Replaced(start, end, length, length + len(told), kind))
        length += len(told)
        at = end
    return Scrubbed("".join((*pieces, text[at:])), tuple(replaced))


def read_names(path: Path) -> tuple[str, ...]:
    """A list of names, one a line. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", fix="give a text file in UTF-8, with one name a line") from None
    return tuple(name for line in lines if (name := line.strip()))


KINDS = (PERSON, DATE, PLACE, NUMBER, AGE, LINK, PHONE, "EMAIL", "IP")
"""What may stand in brackets."""
