"""One line of a batch: OpenAI's request read, and OpenAI's answer written.

    {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {...}}
    {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

A request that was made and refused is a response with its status. A line that asks for nothing that can be made is an
error with a code, without a response; its words never quote the line.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import orjson

from medcompile.serve.files import Record

LONGEST_ID = 512
ITEM_BYTES = 1 << 18
"""So many bytes count for one item at least, which bounds the memory of what is in flight."""


@dataclass(frozen=True)
class Request:
    """What a record asks. items: how many texts, images or answers it is worth, large ones counted several times.

    image: the path of one that comes beside the body.
    """

    custom_id: str
    url: str
    body: dict[str, Any] = field(repr=False)
    items: int = 1
    image: str = field(default="", repr=False)


@dataclass(frozen=True)
class Refused:
    """A record that asks nothing. custom_id: None where there is none to be read."""

    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True)
class Answered:
    """body: JSON. retry_after_s: when asking again may help."""

    status: int
    body: bytes = field(repr=False)
    retry_after_s: float | None = None
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def failed(self) -> bool:
        return self.status >= 400


def parsed(record: Record, urls: Collection[str]) -> Request | Refused:
    """A record of JSON lines."""
    if record.data is None:
        return Refused(None, "invalid_line", f"line {record.line} {record.problem}")
    try:
        line = orjson.loads(record.data)
    except orjson.JSONDecodeError:  # its words tell a position alone, but of this line and not of the file
        return Refused(None, "invalid_json_line", f"line {record.line} is not valid JSON")
    if not isinstance(line, dict):
        return Refused(None, "invalid_json_line", f"line {record.line} is not a JSON object")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= LONGEST_ID:
        told = f"line {record.line} has no custom_id, a text of 1 to {LONGEST_ID} characters"
        return Refused(None, "missing_required_parameter", told)
    if line.get("method") != "POST":
        return Refused(custom_id, "invalid_method", f"line {record.line}: method is not POST")
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str) or url not in urls:
        return Refused(custom_id, "invalid_url", f"line {record.line}: url is none of {', '.join(urls)}")
    if not isinstance(body, dict):
        return Refused(custom_id, "missing_required_parameter", f"line {record.line}: body is not an object")
    if body.get("stream"):
        return Refused(custom_id, "invalid_request", f"line {record.line}: an answer in a file can't be streamed")
    return Request(custom_id, url, body, max(_items(body), len(record.data) // ITEM_BYTES))


def answer_line(its_id: str, request: Request, answered: Answered) -> bytes:
    """The line of a request that was made. its_id: of this batch and this place in it."""
    head = orjson.dumps({"status_code": answered.status, "request_id": request_id(its_id)})
    custom_id = orjson.dumps(request.custom_id)
    rest = b'"custom_id":%b,"response":%b,"body":%b},"error":null}\n' % (custom_id, head[:-1], answered.body)
    return _sealed(its_id, rest)


def refused_line(its_id: str, refused: Refused) -> bytes:
    error = {"code": refused.code, "message": refused.message}
    told = orjson.dumps({"custom_id": refused.custom_id, "response": None, "error": error})
    return _sealed(its_id, told[1:] + b"\n")


def request_id(its_id: str) -> str:
    return its_id.removeprefix("batch_")


def check(line: bytes, its_id: str, custom_id: str | None) -> bool | None:
    """Whether a line that an earlier run left tells an error; None if it is not whole, or another record's."""
    head = b'{"id":"%b_' % its_id.encode()
    seal, rest = line[len(head) : len(head) + _SEAL + 2], line[len(head) + _SEAL + 2 :]
    if not line.startswith(head) or seal != _seal(rest) + b'",':
        return None
    found = orjson.loads(line)
    if found["custom_id"] != custom_id:
        return None
    return found["error"] is not None or bool(found["response"]["status_code"] >= 400)


_SEAL = 8


def _seal(rest: bytes) -> bytes:
    return b"%08x" % zlib.crc32(rest)


def _sealed(its_id: str, rest: bytes) -> bytes:
    """The line, whose id ends with a checksum of all that follows it."""
    return b'{"id":"%b_%b",%b' % (its_id.encode(), _seal(rest), rest)


def digest(custom_id: str | None, number: int) -> bytes:
    """16 bytes that are the same for two lines where their custom_ids are; a line without one is like no other."""
    told = b"\0%d" % number if custom_id is None else b"\1" + custom_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(told, digest_size=16).digest()


def _items(body: dict[str, Any]) -> int:
    """How many texts, images or answers, by what the largest list holds; what is no list is one."""
    counts = (len(body[key]) for key in ("input", "images", "documents", "prompt") if isinstance(body.get(key), list))
    n = body.get("n")
    return max(1, *counts, n if isinstance(n, int) else 1)
