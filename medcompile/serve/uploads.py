"""A request's body: JSON, or multipart/form-data with files, which stay in memory: patients' images touch no disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from medcompile.serve.failures import BadRequest

FILES, FIELDS = 256, 1024
FIELD_BYTES = 1 << 20
_LISTS = {"prompts", "templates"}
"""Fields that may come several times."""


@dataclass(frozen=True)
class Content:
    body: bytes | Mapping[str, Any]
    files: Sequence[bytes] = ()


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize


async def read(request: Request, *, multipart: bool = False) -> Content:
    """Raises BadRequest for another content type, or a form that can't be read."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Content(await request.body())
    if not multipart:
        raise BadRequest("the body's content type is not application/json", fix="send JSON")
    if kind != "multipart/form-data":
        raise BadRequest("a body of an unknown content type", fix="send application/json or multipart/form-data")
    parser = _InMemory(request.headers, request.stream(), max_files=FILES, max_fields=FIELDS, max_part_size=FIELD_BYTES)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError):
        raise BadRequest("the form can't be read", fix="send multipart/form-data as RFC 7578 says") from None
    return Content(_fields(form), [await f.read() for f in form.getlist("images") if isinstance(f, UploadFile)])


def _fields(form: FormData) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in form:
        values = form.getlist(name)
        texts = [v for v in values if isinstance(v, str)]
        if name == "images":
            if texts:
                found[name] = texts
        elif len(texts) != len(values):
            raise BadRequest("a file under another name than images", fix="name every file images", param="images")
        else:
            found[name] = texts if name in _LISTS else texts[-1]
    return found
