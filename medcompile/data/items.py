"""Items and data sets: records checked and made comparable, so that the same content has the same digest everywhere.

Labels are renamed and filtered here. Which items of a file are taken, and whether the file may be read at all, is
decided in the package's own read().
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medcompile.data.images import ImageRef, image_of
from medcompile.data.manifest import GROUPS, Manifest
from medcompile.data.readers import Place, Record
from medcompile.errors import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """A text, a pair of texts, an image, or an image with its caption. What the manifest does not name is empty.

    digest: sha256 hex of the content alone: texts with white space normalized, the image's own digest. words and labels
    run in parallel, and text is the words joined by spaces. text_pair is the passage where text is a query. label: the
    class. document: whose sentences or images belong together, for example a patient's. groups: name and value of each
    of the manifest's groups.
    """

    digest: str
    text: str
    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label: str = ""
    text_pair: str = ""
    document: str = ""
    id: str = ""
    image: ImageRef | None = None
    groups: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Items in file order, from one manifest or several.

    digest covers texts, images, labels, documents, groups and prompts, so that any change of the data shows.
    """

    name: str
    role: Literal["calibration", "tuning", "acceptance"]
    items: tuple[Item, ...]
    digest: str
    manifests: tuple[Manifest, ...]

    @property
    def prompts(self) -> dict[str, str]:
        """What each class is called in words, by label; a label that is not here stands for itself."""
        return {label: text for manifest in self.manifests for label, text in manifest.prompts.items()}

    @property
    def source(self) -> str:
        return "; ".join(dict.fromkeys(m.source for m in self.manifests))

    @property
    def licence(self) -> str:
        """Every licence that stands in the manifests, each once."""
        return "; ".join(dict.fromkeys(m.licence for m in self.manifests))

    @property
    def phi(self) -> Literal["none", "deidentified", "present"]:
        """The gravest of what the manifests state."""
        return max((m.phi for m in self.manifests), key=("none", "deidentified", "present").index)


def item_of(place: Place, record: Record, manifest: Manifest) -> Item:
    """The item in a record. Raises DataError, without the text, if a field is empty, of a wrong type, or not there."""
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    text = ""
    if "words" in record:
        words = _strings(place, "words", record["words"])
        text = " ".join(words)
        if "labels" in record:
            labels = tuple(
                _entity_label(place, label, manifest) for label in _strings(place, "labels", record["labels"])
            )
            if len(labels) != len(words):
                raise place.error(f"has {len(labels)} labels for {len(words)} words")
    elif main := next((f for f in ("query", "text") if f in record), None):
        text = _text(place, main, record)
    pair = next((f for f in ("passage", "text_pair") if f in record), None)
    text_pair = _text(place, pair, record) if pair else ""
    image = _image(place, record) if "image" in record else None
    label = _plain(place, "label", record)
    return Item(
        digest=_digest(place, text, text_pair, image),
        text=text,
        words=words,
        labels=labels,
        label=manifest.label_map.get(label, label),
        text_pair=text_pair,
        document=_plain(place, "document", record),
        id=_plain(place, "id", record),
        image=image,
        groups=tuple((name, _plain(place, GROUPS + name, record)) for name in sorted(manifest.groups)),
    )


def dataset(manifests: tuple[Manifest, ...], items: tuple[Item, ...]) -> Dataset:
    """The data set of those items, which the manifests describe. All manifests have one role."""
    content = hashlib.sha256()
    for item in items:
        content.update(json.dumps([item.digest, item.labels, item.label, item.document]).encode())
        if item.groups:
            content.update(json.dumps(item.groups).encode())
    for manifest in manifests:
        if manifest.prompts:
            content.update(json.dumps(sorted(manifest.prompts.items())).encode())
    name = " + ".join(m.name for m in manifests)
    return Dataset(name, manifests[0].role, items, content.hexdigest(), manifests)


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """One or more data sets as one, their items one set after the other; each keeps its manifest.

    Raises DataError if one is named twice, or their roles differ.
    """
    manifests = tuple(manifest for one in datasets for manifest in one.manifests)
    names = [m.name for m in manifests]
    if len(set(names)) < len(names):
        raise DataError(f"{' + '.join(names)}: the same data set twice", fix="name each data set once")
    if len({m.role for m in manifests}) > 1:
        roles = ", ".join(f"{m.name} {m.role}" for m in manifests)
        raise DataError(f"data sets of different roles: {roles}", fix="join those of one role")
    return dataset(manifests, tuple(item for one in datasets for item in one.items))


def content_digests(item: Item) -> set[str]:
    """Digests of each text and image of an item by itself: a passage or image is the same wherever it stands."""
    texts = {hashlib.sha256(_normal(t).encode()).hexdigest() for t in (item.text, item.text_pair) if t}
    return texts | ({item.image.digest} if item.image else set())


def _image(place: Place, record: Record) -> ImageRef:
    try:
        image = image_of(record["image"])
    except OSError as error:
        raise place.error(f"its image cannot be read: {error.strerror}", "check the file's permissions") from None
    if "sha256" in record and record["sha256"] != image.digest:
        raise place.error("its image is not the one whose sha256 stands there", "get that file again")
    return image


def _digest(place: Place, text: str, text_pair: str, image: ImageRef | None) -> str:
    content = {"text": _normal(text)} if text else {}
    content |= {"text_pair": _normal(text_pair)} if text_pair else {}
    content |= {"image": image.digest} if image else {}
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
