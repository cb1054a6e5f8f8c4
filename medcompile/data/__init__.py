"""Data to calibrate and to judge on: manifests, readers, digests, and the gate for patient information.

read() is the one way in. Nothing here writes a text anywhere: what leaves this room beside the items are digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medcompile.data.images import ImageRef
from medcompile.data.items import Dataset, Item, content_digests, dataset, item_of, joined
from medcompile.data.manifest import Manifest, load_manifest
from medcompile.data.readers import records
from medcompile.errors import DataError, PhiError

__all__ = [
    "Dataset",
    "ImageRef",
    "Item",
    "Manifest",
    "joined",
    "load_manifest",
    "read",
    "shared_items",
    "without_overlap",
]


def read(manifest: Manifest, *, limit: int | None = None, allow_phi: bool = False) -> Dataset:
    """The manifest's items in file order; with limit, that many at most, spread evenly over the order of digests.

    Raises PhiError if the manifest says phi: present and allow_phi is False, before any file is opened; DataError
    if a file is missing, is not the one whose sha256 the manifest holds, or is malformed.
    """
    if manifest.phi == "present" and not allow_phi:
        raise PhiError(
            f"{manifest.name}: its manifest says phi: present, so this run does not read it",
            fix="use de-identified data, or allow it for this run with --allow-phi",
        )
    for name, expected in zip(manifest.paths, manifest.sha256, strict=True):
        found = _sha256(manifest.file(name))
        if found != expected:
            raise DataError(
                f"{manifest.name}: {name} is not the file that the manifest describes: its sha256 is {found}, "
                f"not {expected}",
                fix=f"get that file again; or, if this one is meant, write its sha256 into {manifest.location}",
            )
    chosen = None if limit is None else _spread(manifest, limit)
    items = tuple(
        item_of(place, record, manifest)
        for index, (place, record) in enumerate(records(manifest))
        if chosen is None or index in chosen
    )
    if manifest.keep and chosen is None and not any(label != "O" for item in items for label in item.labels):
        raise DataError(
            f"{manifest.name}: no label of the file is one of those that keep lists: {', '.join(manifest.keep)}",
            fix="check the spelling of keep; it is compared after label_map",
        )
    if chosen is None:
        _check_prompts(manifest, items)
    else:  # a view would keep the whole array in memory
        items = tuple(replace(item, image=item.image.apart()) if item.image else item for item in items)
    return dataset((manifest,), items)


def without_overlap(calibration: Dataset, evaluation: Dataset) -> tuple[Dataset, int]:
    """calibration less every item of which a text or image also stands in evaluation, and how many those were.

    Raises DataError if that is more than half of them: then the two are most likely one and the same file.
    """
    judged = {digest for item in evaluation.items for digest in content_digests(item)}
    kept = tuple(item for item in calibration.items if not content_digests(item) & judged)
    dropped = len(calibration.items) - len(kept)
    if 2 * dropped > len(calibration.items):
        raise DataError(
            f"{dropped} of {len(calibration.items)} calibration items of {calibration.name} also stand in the "
            f"evaluation data {evaluation.name}",
            fix="calibrate on other data than is judged on, for example the training split",
        )
    return (dataset(calibration.manifests, kept) if dropped else replace(calibration)), dropped


def shared_items(datasets: Sequence[Dataset]) -> int:
    """How many items have a text or an image that also stands in a data set before theirs."""
    seen: set[str] = set()
    shared = 0
    for one in datasets:
        digests = [content_digests(item) for item in one.items]
        shared += sum(bool(d & seen) for d in digests)
        seen = seen.union(*digests)
    return shared


def _check_prompts(manifest: Manifest, items: tuple[Item, ...]) -> None:
    """A prompt for a label that no item has is a further class to choose from, unless it looks like a misspelt one."""
    labels = {item.label for item in items}
    idle = [label for label in manifest.prompts if label not in labels]
    bare = labels - set(manifest.prompts)
    if manifest.prompts and idle and bare:
        raise DataError(
            f"{manifest.name}: no item has the label {', '.join(idle)} that prompts names, and {len(bare)} of "
            f"{len(labels)} labels have no prompt",
            fix="check the spelling in prompts; it is compared after label_map",
        )


def _spread(manifest: Manifest, limit: int) -> frozenset[int]:
    """Indices of limit records that lie evenly in the order of their digests, whatever their order in the file."""
    digests = [item_of(place, record, manifest).digest for place, record in records(manifest)]
    order = sorted(range(len(digests)), key=lambda index: (digests[index], index))
    count = min(limit, len(order))
    return frozenset(order[i * len(order) // count] for i in range(count))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
