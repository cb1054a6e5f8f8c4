"""Answers that must match a JSON schema or a regular expression: which tokens may come next, by llguidance.

Every token that would leave the grammar is forbidden before one is chosen, so the text always matches, if the answer
is not cut off by max_tokens. llguidance is an extra; nothing is imported before the first request that needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import BackendUnavailable, InputError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]

_FIX = (
    'give {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}} '
    'or {"type": "regex", "regex": ...}'
)


class Grammars:
    """Makes a Constraint for each request of one tokenizer. vocabulary: width of the logits. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Sequence[int]) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise BackendUnavailable(
                "a response_format needs llguidance, which is not installed",
                fix='pip install "medcompile[constrained]"',
            ) from None
        self._vocabulary = vocabulary
        self._tokens = LLTokenizer(tokenizer.to_str(), n_vocab=vocabulary, eos_token=list(end_ids) or None)

    def constraint(self, response_format: Mapping[str, Any]) -> Constraint:
        """Raises UsageError for a format of unknown shape, InputError for a schema or expression that can't be used."""
        from llguidance import LLMatcher

        grammar = _grammar(response_format)
        wrong = LLMatcher.validate_grammar(grammar, self._tokens)
        if wrong and not wrong.startswith("WARNING"):
            raise InputError(f"response_format can't be used: {wrong}", fix="simplify the schema or expression")
        return Constraint(LLMatcher(self._tokens, grammar, log_level=0), self._vocabulary)


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def done(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, draft: Sequence[int]) -> list[Array | None]:
        """What may follow now, and after each token of a draft: len(draft) + 1 of bool [vocabulary].

        None from the first drafted token on that is not allowed itself, or ends the answer.
        Raises InputError where the grammar takes more work than llguidance allows for one token.
        """
        masks: list[Array | None] = [self._mask()]
        taken = 0
        for token in draft:
            if not self._matcher.validate_tokens([token]) or not self._matcher.consume_token(token):
                break
            taken += 1
            if self.done:
                break
            masks.append(self._mask())
        self._matcher.rollback(taken)
        return masks + [None] * (len(draft) + 1 - len(masks))

    def advance(self, token: int) -> None:
        """Take the chosen token, which was allowed."""
        self._matcher.consume_token(token)

    def _mask(self) -> Array:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise InputError(f"response_format: {self._matcher.get_error()}", fix="simplify the schema or expression")
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)


def _grammar(response_format: Mapping[str, Any]) -> str:
    """In llguidance's own terms."""
    from llguidance import LLMatcher

    kind = response_format.get("type")
    try:
        if kind == "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}')
        if kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(json.dumps(response_format["json_schema"]["schema"]))
        if kind == "regex":
            return LLMatcher.grammar_from_regex(str(response_format["regex"]))
    except (KeyError, TypeError) as error:
        raise UsageError(f"response_format of type {kind} is incomplete: {error}", fix=_FIX) from None
    raise UsageError(f"response_format of type {kind!r}", fix=_FIX)
