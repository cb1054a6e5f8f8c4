"""Data manifests: what a data set is, where it lies, what its columns mean, and whether it holds patient information.

A manifest is a small YAML file in calibration/. The data itself may lie anywhere; its sha256 is part of the manifest,
so that a build says exactly what it was calibrated and judged on. Reading the data is readers.py's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from medcompile import recipe_yaml
from medcompile.errors import DataError

Format = Literal["jsonl", "csv", "conll", "images", "npz"]
Role = Literal["calibration", "tuning", "acceptance"]
FieldName = Literal[
    "text", "words", "labels", "label", "query", "passage", "text_pair", "document", "id", "image", "sha256"
]

GROUPS = "groups."
DATA_FOLDER = "MEDCOMPILE_DATA"


@dataclass(frozen=True)
class Manifest:
    """A data set described. paths: the files as the manifest writes them; sha256: theirs, in the same order.

    For format images the files are indices, CSV or JSON lines, that name one image a line. fields: our name -> the key,
    column name, array name (npz), or column number from 0 (conll). label_map renames labels or entity types; keep lists
    the entity types that count, all others become O. prompts: label -> what that class is called in words, to match
    images against; a label without one stands for itself. location: the manifest's own file. groups: the name of a
    grouping of the items (site, sex) -> the key, column or array that holds each item's group.
    """

    name: str
    source: str
    format: Format
    fields: dict[str, str | int]
    role: Role
    licence: str
    phi: Literal["none", "deidentified", "present"]
    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    label_map: dict[str, str]
    keep: tuple[str, ...]
    prompts: dict[str, str]
    language: str
    location: Path
    groups: dict[str, str]

    @property
    def columns(self) -> dict[str, str | int]:
        """fields and groups together, a group called `groups.NAME`: all that is read of a record."""
        return self.fields | {GROUPS + name: column for name, column in self.groups.items()}

    def file(self, path: str) -> Path:
        """Where one of paths lies: beside the manifest, or in the folder that MEDCOMPILE_DATA names.

        Raises DataError, naming both, if it is in neither.
        """
        folders = [self.location.parent]
        if os.environ.get(DATA_FOLDER):
            folders.append(Path(os.environ[DATA_FOLDER]))
        for folder in folders:
            if (folder / path).is_file():
                return folder / path
        raise DataError(
            f"{self.name}: no file {path} in {' or '.join(str(f) for f in folders)}",
            fix=f"get it from {self.source}, and set {DATA_FOLDER} to the folder that holds {path}",
        )


def load_manifest(path: Path | str) -> Manifest:
    """The manifest at path. Raises DataError that lists every problem with its line and column."""
    document = recipe_yaml.read(Path(path), str(path))
    keys = None
    if not document.problems or document.value is not None:
        keys = recipe_yaml.validate(_ManifestKeys, document)
        if isinstance(document.value, dict):
            for key, message, fix in _cross_checks(document.value):
                document.report(key, message, fix)
    if keys is None or document.problems:
        raise DataError("\n".join(str(p) for p in document.in_order()))
    return Manifest(
        name=keys.name,
        source=keys.source,
        format=keys.format,
        fields={str(ours): theirs for ours, theirs in keys.fields.items()},
        role=keys.role,
        licence=keys.licence,
        phi=keys.phi,
        paths=tuple(keys.path),
        sha256=tuple(keys.sha256),
        label_map=keys.label_map,
        keep=tuple(keys.keep),
        prompts=keys.prompts,
        language=keys.language,
        location=Path(path),
        groups=keys.groups,
    )


def _listed(value: Any) -> Any:
    """One path or one digest counts as a list of one."""
    return value if value is None or isinstance(value, list) else [value]


def _digests(values: list[str]) -> list[str]:
    for value in values:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise recipe_yaml.failure(
                f"{recipe_yaml.shown(value)} is not a sha256 (64 of 0-9 a-f)", "write what `sha256sum FILE` prints"
            )
    return values


def _group_names(groups: dict[str, str]) -> dict[str, str]:
    for name in groups:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise recipe_yaml.failure(
                f"{recipe_yaml.shown(name)} is no name of a group (letters, digits, _ and -)",
                "name it as a budget will: accuracy[worst:site]",
            )
    return groups


class _ManifestKeys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1, examples=["my-notes"])
    source: str = Field(min_length=1, examples=["https://..., or how the data came to be"])
    format: Format = Field(examples=["jsonl"])
    fields: dict[FieldName, Any] = Field(min_length=1, examples=["{text: text}"])
    role: Role = Field(examples=["calibration"])
    licence: str = Field(min_length=1, examples=["CC0-1.0"])
    phi: Literal["none", "deidentified", "present"] = Field(examples=["none"])
    path: Annotated[list[str], BeforeValidator(_listed)] = Field(min_length=1, examples=["my-notes.jsonl"])
    sha256: Annotated[list[str], BeforeValidator(_listed), AfterValidator(_digests)] = Field(
        min_length=1, examples=["<64 hex digits, from `sha256sum FILE`>"]
    )
    label_map: dict[str, str] = Field(default_factory=dict, examples=["{disease: Disease}"])
    keep: list[str] = Field(default_factory=list, examples=["[Disease]"])
    prompts: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict, examples=["{pneumonia: chest x-ray showing pneumonia}"]
    )
    language: str = Field(default="en", examples=["en"])
    groups: Annotated[dict[str, str], AfterValidator(_group_names)] = Field(
        default_factory=dict, examples=["{site: hospital, sex: sex}"]
    )


_NAMED = {"jsonl": "jsonl key or column", "csv": "csv key or column", "images": "key or column", "npz": "array"}
_HOLDS = {
    "jsonl": ("text", "words", "labels", "label", "query", "passage", "text_pair", "document", "id"),
    "csv": ("text", "label", "query", "passage", "text_pair", "document", "id"),
    "conll": ("words", "labels"),
    "images": ("image", "text", "label", "document", "id", "sha256"),
    "npz": ("image", "text", "label", "document", "id"),
}
"""What each format's columns are called in messages, and the fields it can hold."""


def _cross_checks(value: dict[str, Any]) -> list[tuple[recipe_yaml.Keys, str, str]]:
    """Rules that tie keys together: (way, message, fix). Parts of a wrong type are passed over."""
    found: list[tuple[recipe_yaml.Keys, str, str]] = []
    paths, digests = _listed(value.get("path")), _listed(value.get("sha256"))
    if isinstance(paths, list) and isinstance(digests, list) and len(paths) != len(digests):
        message = f"{len(digests)} sha256 for {len(paths)} files"
        found.append((("sha256",), message, "give one sha256 for each path, in the same order"))
    fields, kind = value.get("fields"), value.get("format")
    if kind == "conll" and value.get("groups"):
        found.append((("groups",), "conll has no column that could hold groups", "use jsonl, or remove groups"))
    if not isinstance(fields, dict) or not fields:
        return found
    mains = [f for f in ("text", "words", "query", "image") if f in fields]
    if len(mains) != 1 and mains != ["text", "image"]:
        message = "fields must name exactly one of text, words, query and image, or image with text"
        found.append((("fields",), message, "keep one of them"))
    for field, partner in (
        ("labels", "words"),
        ("passage", "query"),
        ("query", "passage"),
        ("text_pair", "text"),
        ("sha256", "image"),
    ):
        if field in fields and partner not in fields:
            message = f"fields.{field} goes with {partner}, which is not named"
            found.append((("fields", field), message, f"add {partner} to fields"))
    for field, column in fields.items():
        if kind == "conll" and (type(column) is not int or column < 0):
            message = f"fields.{field}: a conll column is a number, counted from 0"
            found.append((("fields", field), message, f"write {field}: 0"))
        elif kind in _NAMED and not isinstance(column, str):
            message = f"fields.{field}: name the {_NAMED[kind]}"
            found.append((("fields", field), message, f"write {field}: {field}"))
        elif kind in _HOLDS and field in get_args(FieldName) and field not in _HOLDS[kind]:
            message, fix = f"{kind} has no {field}; it has {', '.join(_HOLDS[kind])}", f"remove {field}"
            if field in {"words", "labels"}:
                message, fix = f"{kind} holds no lists, so no {field}", "use jsonl or conll"
            elif field == "image":
                message, fix = f"{kind} has no image; its items are texts", "write format: images, or npz"
            found.append((("fields", field), message, fix))
    if kind in {"images", "npz"} and "image" not in fields:
        found.append((("fields",), f"{kind} needs image in fields", "add image to fields"))
    for key, needed in (("keep", ("labels",)), ("label_map", ("labels", "label"))):
        if value.get(key) and not any(f in fields for f in needed):
            found.append(((key,), f"{key} needs {' or '.join(needed)} in fields", f"remove {key}"))
    if kind == "images" and isinstance(paths, list):
        for path in paths:
            if isinstance(path, str) and not path.endswith((".csv", ".jsonl")):
                message = f"{recipe_yaml.shown(path)} is not the name of an index of images"
                found.append((("path",), message, "name a .csv with a header or a .jsonl that lists the images"))
    return found + _prompt_checks(value.get("prompts"), value.get("label_map"), fields)


def _prompt_checks(prompts: Any, label_map: Any, fields: dict[str, Any]) -> list[tuple[recipe_yaml.Keys, str, str]]:
    if not isinstance(prompts, dict) or not prompts:
        return []
    if not {"image", "label"} <= set(fields):
        return [(("prompts",), "prompts needs image and label in fields", "remove prompts")]
    if not isinstance(label_map, dict):
        return []
    labels = [v for v in label_map.values() if isinstance(v, str)]
    found: list[tuple[recipe_yaml.Keys, str, str]] = []
    for label in (p for p in prompts if p not in labels):
        free = [v for v in labels if v not in prompts]
        hint = (
            recipe_yaml.nearest(str(label_map[label]), free) if label in label_map else recipe_yaml.nearest(label, free)
        )
        if hint:
            message = f"prompts.{label}: label_map gives no label {label!r}{hint}"
            found.append((("prompts", label), message, "write each label as label_map gives it"))
    return found
