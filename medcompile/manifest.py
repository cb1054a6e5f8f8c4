"""The manifest as bytes: canonical JSON that carries a digest of itself, and dataclasses to and from plain JSON.

Knows nothing of folders (bundle.py does) and nothing of what the keys mean: dataclasses are encoded and decoded by
their type hints, so a field added to spec.py needs no line here. Standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from medcompile.errors import BundleError, MedcompileError

FORMAT_VERSION = 1


class Malformed(MedcompileError):
    """A value of the manifest has the wrong shape; the message says where."""


def seal(data: Mapping[str, Any]) -> bytes:
    """The manifest's only valid bytes: canonical JSON of data, the format's version, and a digest over both."""
    versioned = {**data, "format_version": FORMAT_VERSION}
    digest = hashlib.sha256(_canonical(versioned)).hexdigest()
    return _canonical({**versioned, "digest": digest})


def _canonical(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The data that was sealed into raw. Only the bytes that seal() gives are accepted: no flipped byte gets through.

    where: what error messages call raw. Raises BundleError.
    """
    fix = "copy the bundle again from where it was built, or rebuild it"
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not JSON: {error}", fix=fix) from None
    if not isinstance(data, dict):
        raise BundleError(f"{where}: a {type(data).__name__}, not an object", fix=fix)
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{where}: format version {version!r}; this medcompile reads version {FORMAT_VERSION}",
            fix="rebuild the bundle, or install the medcompile that wrote it",
        )
    body = {k: v for k, v in data.items() if k not in ("digest", "format_version")}
    try:
        sealed = seal(body)
    except (ValueError, RecursionError):  # NaN, which no writer of ours leaves
        sealed = b""
    if raw != sealed:
        raise BundleError(f"{where}: its content doesn't match its own digest; it was altered", fix=fix)
    return body


def encode(value: Any) -> Any:
    """Plain JSON values. Floats that JSON can't say (inf, nan) become strings, which decode takes back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(hint: Any, value: Any, where: str) -> Any:
    """value as the type hint says. Raises Malformed naming the place in the manifest."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_dataclass(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return decode(choice, value, where)
            except Malformed:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif origin is tuple and isinstance(value, list):
        each = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        if len(each) == len(value):
            return tuple(decode(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(each, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {k: decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    elif isinstance(hint, type) and issubclass(hint, Enum):
        if value in [m.value for m in hint]:
            return hint(value)
    elif hint is float:
        if type(value) in (int, float) or value in ("inf", "-inf", "nan"):
            return float(value)
    elif type(value) is hint:
        return value
    raise Malformed(f"{where}: {str(value)[:60]!r} is not {getattr(hint, '__name__', hint)}")


def _decode_dataclass(cls: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: not an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    odd = (required - set(value)) | (set(value) - set(fields))
    if odd:
        raise Malformed(f"{where or 'manifest'}: missing or unknown key {', '.join(sorted(odd))}")
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{n: decode(hints[n], v, f"{where}.{n}".lstrip(".")) for n, v in value.items()})
    except Malformed:
        raise
    except MedcompileError as error:  # a constructor's own check, such as Axis's
        raise Malformed(f"{where}: {error.message}") from None
