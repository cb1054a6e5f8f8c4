"""Data manifests: what a data set is, where it lies, what its columns mean, and whether it holds patient information.

A manifest is a small YAML file in calibration/. The data itself may lie anywhere; its sha256 is part of the manifest,
so that a build says exactly what it was calibrated and judged on. Reading the data is readers.py's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from medcompile import recipe_yaml
from medcompile.errors import DataError

Format = Literal["jsonl", "csv", "conll"]
Role = Literal["calibration", "tuning", "acceptance"]
FieldName = Literal["text", "words", "labels", "label", "query", "passage", "text_pair", "document", "id"]

DATA_FOLDER = "MEDCOMPILE_DATA"


@dataclass(frozen=True)
class Manifest:
    """A data set described. paths: the files as the manifest writes them; sha256: theirs, in the same order.

    fields: our name -> the key, column name, or (conll) column number from 0. label_map renames labels or entity
    types; keep lists the entity types that count, all others become O. location: the manifest's own file.
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
    language: str
    location: Path

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
        language=keys.language,
        location=Path(path),
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
    language: str = Field(default="en", examples=["en"])


def _cross_checks(value: dict[str, Any]) -> list[tuple[recipe_yaml.Keys, str, str]]:
    """Rules that tie keys together: (way, message, fix). Parts of a wrong type are passed over."""
    found: list[tuple[recipe_yaml.Keys, str, str]] = []
    paths, digests = _listed(value.get("path")), _listed(value.get("sha256"))
    if isinstance(paths, list) and isinstance(digests, list) and len(paths) != len(digests):
        message = f"{len(digests)} sha256 for {len(paths)} files"
        found.append((("sha256",), message, "give one sha256 for each path, in the same order"))
    fields, kind = value.get("fields"), value.get("format")
    if not isinstance(fields, dict) or not fields:
        return found
    mains = [f for f in ("text", "words", "query") if f in fields]
    if len(mains) != 1:
        found.append((("fields",), "fields must name exactly one of text, words and query", "keep one of them"))
    for field, partner in (("labels", "words"), ("passage", "query"), ("query", "passage"), ("text_pair", "text")):
        if field in fields and partner not in fields:
            message = f"fields.{field} goes with {partner}, which is not named"
            found.append((("fields", field), message, f"add {partner} to fields"))
    for field, column in fields.items():
        if kind == "conll" and (type(column) is not int or column < 0):
            message = f"fields.{field}: a conll column is a number, counted from 0"
            found.append((("fields", field), message, f"write {field}: 0"))
        elif kind == "conll" and field not in {"words", "labels"}:
            found.append((("fields", field), f"conll has no {field}; it has words and labels", f"remove {field}"))
        elif kind in {"jsonl", "csv"} and not isinstance(column, str):
            found.append(
                (("fields", field), f"fields.{field}: name the {kind} key or column", f"write {field}: {field}")
            )
        elif kind == "csv" and field in {"words", "labels"}:
            found.append((("fields", field), f"csv holds no lists, so no {field}", "use jsonl or conll"))
    for key in ("keep", "label_map"):
        needed = ("labels",) if key == "keep" else ("labels", "label")
        if value.get(key) and not any(f in fields for f in needed):
            found.append(((key,), f"{key} needs {' or '.join(needed)} in fields", f"remove {key}"))
    return found
