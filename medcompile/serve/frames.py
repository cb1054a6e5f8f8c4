"""What the server and a worker say to each other: frames on a socket, for asyncio and for threads alike.

A frame is two big-endian 32-bit lengths, a JSON header and a binary body (float32 rows, image bytes). No pickle: a
worker that an odd image has taken over can say nothing but numbers and text to the server.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from medcompile.errors import BackendError

LIMIT_BYTES = 1 << 30
"""Of a header, and of a body. More is no frame of ours, and reading on would mean nothing."""

_LENGTHS = struct.Struct("!II")
_READ_BYTES = 1 << 18
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Frame(NamedTuple):
    header: dict[str, Any]
    body: bytes = b""


def packed(header: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """The bytes of one frame."""
    told = _encode(header).encode()
    return b"".join((_LENGTHS.pack(len(told), len(body)), told, body))


class Unpacker:
    """Frames out of bytes as they come, cut anywhere."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that these bytes complete. Raises BackendError for what can't be a frame."""
        self._held += data
        found: list[Frame] = []
        at = 0
        while len(self._held) - at >= _LENGTHS.size:
            header, body = _LENGTHS.unpack_from(self._held, at)
            if max(header, body) > LIMIT_BYTES:
                raise BackendError(f"a frame of {max(header, body)} bytes", fix="restart the server; report this")
            start = at + _LENGTHS.size
            if len(self._held) < start + header + body:
                break
            at = start + header + body
            with memoryview(self._held) as view:
                told = json.loads(bytes(view[start : start + header]))
                found.append(Frame(told, bytes(view[start + header : at])))
        del self._held[:at]
        return found


def received(connection: socket.socket) -> Iterator[list[Frame]]:
    """Frames from a blocking socket, those together that came together, until the other side is gone."""
    unpacker = Unpacker()
    while True:
        try:
            data = connection.recv(_READ_BYTES)
        except ConnectionError:
            return
        if not data:
            return
        if frames := unpacker.feed(data):
            yield frames
