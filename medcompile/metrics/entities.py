"""Entities in a sequence of word labels, counted by the rules of seqeval's default mode.

Word labels in, counts per unit and entity type out. The rules are the lenient ones that published NER scores use: an
I- that follows no B-, or follows another type, opens an entity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_TAGS = "OBIES"
_O, _B, _I, _E, _S = range(5)


@dataclass(frozen=True)
class EntityCounts:
    """Entities by unit and type, int64 [units, types]: in the gold labels, predicted, and predicted rightly."""

    gold: Ints
    predicted: Ints
    right: Ints


def entity_types(labels: Sequence[str]) -> tuple[Ints, Ints, tuple[str, ...]]:
    """Split label names into tags and types. Returns tag codes, type codes (one each per label) and the type names.

    A name without a prefix ("PATIENT") counts as I-PATIENT: neighbours of one name make one entity.
    """
    tags, types = [], []
    for label in labels:
        prefixed = label in tuple(_TAGS) or label[:2] in ("B-", "I-", "E-", "S-")
        tags.append(_TAGS.index(label[0]) if prefixed else _I)
        types.append((label[2:] or "_") if prefixed else label)
    names = tuple(sorted({t for t, tag in zip(types, tags, strict=True) if tag != _O}))
    codes = [names.index(t) if tag != _O else len(names) for t, tag in zip(types, tags, strict=True)]
    return np.array(tags, dtype=np.int64), np.array(codes, dtype=np.int64), names


def entity_spans(words: Ints, tags: Ints, types: Ints) -> tuple[Ints, Ints, Ints]:
    """First word, last word and type of every entity in label ids that end in an O. Source: seqeval 1.2.2."""
    tag, kind = tags[words], types[words]
    before, kind_before = np.roll(tag, 1), np.roll(kind, 1)
    changes = kind_before != kind
    ends = np.isin(before, (_E, _S)) | (np.isin(before, (_B, _I)) & np.isin(tag, (_B, _S, _O)))
    ends |= (before != _O) & changes
    begins = np.isin(tag, (_B, _S)) | (np.isin(before, (_E, _S, _O)) & np.isin(tag, (_E, _I)))
    begins |= (tag != _O) & changes
    first = np.flatnonzero(begins)
    return first, np.flatnonzero(ends) - 1, kind[first]


@dataclass(frozen=True)
class _Spans:
    """Entities of sentences laid end to end. sentence: the one that each is in. keys: equal for equal entities."""

    sentence: Ints
    kind: Ints
    keys: Ints


def _spans(sentences: Sequence[Ints], labels: Sequence[str]) -> _Spans:
    tags, types, names = entity_types([*labels, "O"])
    separator = np.array([len(labels)], dtype=np.int64)
    words = np.concatenate([part for sentence in sentences for part in (sentence, separator)])
    first, last, kind = entity_spans(words, tags, types)
    sentence = np.repeat(np.arange(len(sentences)), [len(one) + 1 for one in sentences])[first]
    return _Spans(sentence, kind, (first * len(words) + last) * max(len(names), 1) + kind)


def count_entities(gold: Sequence[Ints], predicted: Sequence[Ints], unit: Ints, labels: Sequence[str]) -> EntityCounts:
    """Count entities per unit. gold, predicted: label ids per sentence; unit: the unit's index of every sentence.

    An entity is right when its first word, last word and type all agree with one in the gold labels.
    """
    width = max(len(entity_types(labels)[2]), 1)
    units = int(unit.max()) + 1

    def per_unit(spans: _Spans, of: Bools | slice = slice(None)) -> Ints:
        cells = (unit[spans.sentence] * width + spans.kind)[of]
        return np.bincount(cells, minlength=units * width).reshape(units, width)

    true, said = _spans(gold, labels), _spans(predicted, labels)
    return EntityCounts(per_unit(true), per_unit(said), per_unit(said, np.isin(said.keys, true.keys)))


def found_entities(gold: Sequence[Ints], predicted: Sequence[Ints], labels: Sequence[str]) -> tuple[Ints, Bools]:
    """The sentence of each entity in the gold labels, and whether it is among the predicted ones. [entities] each."""
    true = _spans(gold, labels)
    return true.sentence, np.isin(true.keys, _spans(predicted, labels).keys)
