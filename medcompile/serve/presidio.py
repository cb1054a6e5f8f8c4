"""presidio-analyzer as scrub.py uses it: its recognizers and ours, no network, no pattern left out for being slow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex
from presidio_analyzer import (
    AnalyzerEngine,
    EntityRecognizer,
    Pattern,
    PatternRecognizer,
    RecognizerRegistry,
    RecognizerResult,
    predefined_recognizers,
)
from presidio_analyzer.nlp_engine import NerModelConfiguration, NlpEngine, NoOpNlpEngine, SpacyNlpEngine

from medcompile.errors import UsageError
from medcompile.serve import phi_patterns

_TIMEOUT_S = 5.0
"""Of one pattern on one text."""
_OF_MODELS = ("PERSON", "LOCATION")
"""What is taken from a language model; its dates are mostly durations ("two days"), which clinical text needs."""
_FEWEST_DIGITS = 7
"""Of a telephone number."""
_EXACT = regex.MULTILINE | regex.V1


def analyzer(names: Sequence[str], model: str) -> AnalyzerEngine:
    """model: a spaCy model by its package's name or its folder; "" for none. Raises UsageError where it is not here."""
    models = [{"lang_code": "en", "model_name": model or "none"}]
    registry = RecognizerRegistry(recognizers=_recognizers(names), supported_languages=["en"])
    engine: NlpEngine = NoOpNlpEngine(models=models)
    if model:
        from spacy.util import is_package

        if not (is_package(model) or (Path(model) / "meta.json").exists()):
            raise UsageError(f"no spaCy model {model!r} is installed", fix="install its package, or give its folder")
        engine = SpacyNlpEngine(models=models, ner_model_configuration=NerModelConfiguration())
        registry.add_recognizer(predefined_recognizers.SpacyRecognizer(supported_entities=list(_OF_MODELS)))
    engine.load()
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])


class InTime(EntityRecognizer):
    """A recognizer's patterns and checks. One that takes too long raises TimeoutError; presidio would go on without."""

    timeout_s = _TIMEOUT_S

    def __init__(self, of: Any) -> None:
        self._of = of
        self._compiled = [(p.score, regex.compile(p.regex, flags=of.global_regex_flags)) for p in of.patterns]
        super().__init__(supported_entities=of.supported_entities, name=f"{of.name}_{id(of)}")

    def load(self) -> None:
        return

    def analyze(self, text: str, entities: list[str], nlp_artifacts: object = None) -> list[RecognizerResult]:
        found = []
        for score, compiled in self._compiled:
            for match in compiled.finditer(text, timeout=self.timeout_s, concurrent=True):
                good = self._of.validate_result(match[0])
                if not match[0] or good is False or self._of.invalidate_result(match[0]):
                    continue
                kind: str = self.supported_entities[0]
                found.append(RecognizerResult(kind, match.start(), match.end(), 1.0 if good else score))
        return found


class Telephone(predefined_recognizers.PhoneRecognizer):
    """presidio's, which takes a blood pressure (168/112) for a number to call."""

    def analyze(self, text: str, entities: list[str], nlp_artifacts: Any = None) -> list[RecognizerResult]:
        found = super().analyze(text, entities, nlp_artifacts)
        spans = [text[one.start : one.end] for one in found]
        return [
            one
            for one, span in zip(found, spans, strict=True)
            if "/" not in span and sum(c.isdigit() for c in span) >= _FEWEST_DIGITS
        ]


def _recognizers(names: Sequence[str]) -> list[EntityRecognizer]:
    held = [_ours(kind, patterns) for kind, patterns in phi_patterns.EXACT.items()]
    theirs = predefined_recognizers
    held.append(PatternRecognizer("EMAIL_ADDRESS", patterns=theirs.EmailRecognizer.PATTERNS))  # its check would fetch
    held += [theirs.DateRecognizer(), theirs.UsSsnRecognizer(), theirs.IpRecognizer(), theirs.MacAddressRecognizer()]
    held += [theirs.CreditCardRecognizer(), theirs.NhsRecognizer()]
    if names:
        whole = "|".join(_spelled(name) for name in sorted(set(names), key=len, reverse=True))
        held.append(_ours(phi_patterns.PERSON, [rf"(?i)(?<![\p{{L}}\d])(?:{whole})(?:['’]s)?(?![\p{{L}}\d])"]))
    return [*(InTime(one) for one in held), Telephone()]


def _ours(kind: str, patterns: Sequence[str]) -> PatternRecognizer:
    made = [Pattern(f"{kind} {number}", pattern, 0.9) for number, pattern in enumerate(patterns)]
    return PatternRecognizer(kind, name=f"ours {kind}", patterns=made, global_regex_flags=_EXACT)


def _spelled(name: str) -> str:
    """A name as notes write it: with any space between its words, and with last and first name turned about."""
    words = [regex.escape(word) for word in name.replace(",", " ").split()]
    forms = [r"\s+".join(words)]
    if len(words) > 1:
        forms.append(rf"{words[-1]}\s*,\s*" + r"\s+".join(words[:-1]))
    return "|".join(forms)
