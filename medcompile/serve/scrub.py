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
from typing import TYPE_CHECKING, Any, ClassVar

from medcompile.errors import BackendUnavailable, InputError, UsageError
from medcompile.serve import phi_patterns
from medcompile.serve.phi_patterns import AGE, DATE, LINK, NUMBER, PERSON, PLACE

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine, EntityRecognizer

_TIMEOUT_S = 5.0
"""Of one pattern on one text."""
_LOWEST_SCORE = 0.35
_KINDS = {
    "DATE_TIME": DATE,
    "EMAIL_ADDRESS": "EMAIL",
    "PHONE_NUMBER": "PHONE",
    "US_SSN": NUMBER,
    "UK_NHS": NUMBER,
    "CREDIT_CARD": NUMBER,
    "MAC_ADDRESS": NUMBER,
    "IP_ADDRESS": "IP",
}
_OF_MODELS = ("PERSON", "LOCATION")
"""What is taken from a language model; its dates are mostly durations ("two days"), which clinical text needs."""

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
        self._analyzer = _analyzer(names, model)
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


# ---- presidio


def _analyzer(names: Sequence[str], model: str) -> AnalyzerEngine:
    try:
        import presidio_analyzer  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "scrubbing needs the package presidio-analyzer", fix="pip install 'medcompile[scrub]'"
        ) from error
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NerModelConfiguration, NoOpNlpEngine, SpacyNlpEngine

    models = [{"lang_code": "en", "model_name": model or "none"}]
    registry = RecognizerRegistry(recognizers=_recognizers(names), supported_languages=["en"])
    if not model:
        engine: Any = NoOpNlpEngine(models=models)
    else:
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer
        from spacy.util import is_package

        if not (is_package(model) or (Path(model) / "meta.json").exists()):
            raise UsageError(f"no spaCy model {model!r} is installed", fix="install its package, or give its folder")
        engine = SpacyNlpEngine(models=models, ner_model_configuration=NerModelConfiguration())
        registry.add_recognizer(SpacyRecognizer(supported_entities=list(_OF_MODELS)))
    engine.load()
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])


def _recognizers(names: Sequence[str]) -> list[EntityRecognizer]:
    from presidio_analyzer import EntityRecognizer, Pattern, PatternRecognizer, RecognizerResult
    from presidio_analyzer import predefined_recognizers as theirs

    class InTime(EntityRecognizer):  # type: ignore[misc]
        """A recognizer's patterns and checks, without its leaving out of a pattern that takes too long."""

        timeout_s: ClassVar[float] = _TIMEOUT_S

        def __init__(self, of: PatternRecognizer) -> None:
            import regex

            self._of = of
            self._compiled = [(p.score, regex.compile(p.regex, flags=of.global_regex_flags)) for p in of.patterns]
            super().__init__(supported_entities=of.supported_entities, name=f"{of.name}_{id(of)}")

        def load(self) -> None: ...

        def analyze(self, text: str, entities: Sequence[str], nlp_artifacts: object = None) -> list[RecognizerResult]:
            found = []
            for score, compiled in self._compiled:
                for match in compiled.finditer(text, timeout=self.timeout_s):
                    good = self._of.validate_result(match[0])
                    if not match[0] or good is False or self._of.invalidate_result(match[0]):
                        continue
                    found.append(RecognizerResult(self.supported_entities[0], *match.span(), 1.0 if good else score))
            return found

    def ours(kind: str, patterns: Sequence[str], flags: int) -> PatternRecognizer:
        made = [Pattern(f"{kind} {number}", pattern, 0.9) for number, pattern in enumerate(patterns)]
        return PatternRecognizer(kind, name=f"ours {kind}", patterns=made, global_regex_flags=flags)

    import regex

    exact = regex.MULTILINE | regex.V1
    held = [ours(kind, patterns, exact) for kind, patterns in phi_patterns.EXACT.items()]
    email = PatternRecognizer("EMAIL_ADDRESS", patterns=theirs.EmailRecognizer.PATTERNS)  # its check goes to the net
    held += [
        email,
        theirs.DateRecognizer(),
        theirs.UsSsnRecognizer(),
        theirs.IpRecognizer(),
        theirs.MacAddressRecognizer(),
    ]
    held += [theirs.CreditCardRecognizer(), theirs.NhsRecognizer()]
    if names:
        whole = "|".join(_spelled(name) for name in sorted(set(names), key=len, reverse=True))
        held.append(ours(PERSON, [rf"(?i)(?<![\p{{L}}\d])(?:{whole})(?:['’]s)?(?![\p{{L}}\d])"], exact))
    return [*(InTime(one) for one in held), theirs.PhoneRecognizer()]


def _spelled(name: str) -> str:
    """A name as notes write it: with any space between its words, and with last and first name turned about."""
    import regex

    words = [regex.escape(word) for word in name.replace(",", " ").split()]
    forms = [r"\s+".join(words)]
    if len(words) > 1:
        forms.append(rf"{words[-1]}\s*,\s*" + r"\s+".join(words[:-1]))
    return "|".join(forms)


KINDS = (PERSON, DATE, PLACE, NUMBER, AGE, LINK, "EMAIL", "PHONE", "IP")
"""What may stand in brackets."""
