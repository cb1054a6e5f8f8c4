"""Items and data sets: records checked and made comparable, so that the same text has the same digest everywhere.

Labels are renamed and filtered here. Which items of a file are taken, and whether the file may be read at all, is
decided in the package's own read().
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from medcompile.data.manifest import Manifest
from medcompile.data.readers import Place, Record


@dataclass(frozen=True, slots=True)
class Item:
    """One text (or pair of texts) with what is known of it. Fields that the manifest does not name are empty.

    digest: sha256 hex of the texts alone, white space normalized. words and labels run in parallel, and text is the
    words joined by spaces. text_pair is the passage where text is a query. document: whose sentences belong together.
    """

    digest: str
    text: str
    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label: str = ""
    text_pair: str = ""
    document: str = ""
    id: str = ""


@dataclass(frozen=True)
class Dataset:
    """Items in file order. digest covers their texts, labels and documents, so that any change of the data shows."""

    name: str
    role: Literal["calibration", "tuning", "acceptance"]
    items: tuple[Item, ...]
    digest: str
    manifest: Manifest


def item_of(place: Place, record: Record, manifest: Manifest) -> Item:
    """The item in a record. Raises DataError, without the text, if a field is empty or of a wrong type."""
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    if "words" in record:
        words = _strings(place, "words", record["words"])
        text = " ".join(words)
        if "labels" in record:
            labels = tuple(
                _entity_label(place, label, manifest) for label in _strings(place, "labels", record["labels"])
            )
            if len(labels) != len(words):
                raise place.error(f"has {len(labels)} labels for {len(words)} words")
    else:
        text = _text(place, "query" if "query" in record else "text", record)
    pair = next((f for f in ("passage", "text_pair") if f in record), None)
    text_pair = _text(place, pair, record) if pair else ""
    label = _plain(place, "label", record)
    return Item(
        digest=_digest(place, text, text_pair),
        text=text,
        words=words,
        labels=labels,
        label=manifest.label_map.get(label, label),
        text_pair=text_pair,
        document=_plain(place, "document", record),
        id=_plain(place, "id", record),
    )


def dataset(manifest: Manifest, items: tuple[Item, ...]) -> Dataset:
    """The data set of those items."""
    content = hashlib.sha256()
    for item in items:
        content.update(json.dumps([item.digest, item.labels, item.label, item.document]).encode())
    return Dataset(manifest.name, manifest.role, items, content.hexdigest(), manifest)


def text_digests(item: Item) -> set[str]:
    """Digests of each text of an item by itself: a passage is the same text wherever it stands."""
    return {hashlib.sha256(_normal(t).encode()).hexdigest() for t in (item.text, item.text_pair) if t}


def _digest(place: Place, text: str, text_pair: str) -> str:
    content = {"text": _normal(text)} | ({"text_pair": _normal(text_pair)} if text_pair else {})
    try:
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise place.error("holds half of a surrogate pair, which is no character") from None
    return hashlib.sha256(canonical).hexdigest()


def _normal(text: str) -> str:
    return " ".join(text.split())


def _text(place: Place, field: str, record: Record) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise place.error(f"{field} is not text")
    if not value.strip():
        raise place.error(f"{field} is empty", "fill it in or remove the line")
    return value


def _plain(place: Place, field: str, record: Record) -> str:
    value = record.get(field, "")
    if not isinstance(value, str | int):
        raise place.error(f"{field} is neither text nor a whole number")
    return str(value)


def _strings(place: Place, field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise place.error(f"{field} is not a list of words, none of them empty")
    return tuple(value)


def _entity_label(place: Place, label: str, manifest: Manifest) -> str:
    if label == "O":
        return label
    mark, dash, kind = label.partition("-")
    if mark not in {"B", "I"} or not dash or not kind:
        raise place.error("has a label that is none of O, B-..., I-...", "check which column holds the labels")
    kind = manifest.label_map.get(kind, kind)
    if kind == "O" or (manifest.keep and kind not in manifest.keep):
        return "O"
    return f"{mark}-{kind}"
