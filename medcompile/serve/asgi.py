"""The types of ASGI, and the few things that every middleware here does: read a header, refuse."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Refusal:
    """An answer in place of the app's, in the shape that OpenAI's errors have. Says nothing of what was sent."""

    status: int
    code: str
    message: str
    kind: str = "invalid_request_error"
    headers: Mapping[str, str] = field(default_factory=dict)

    async def to(self, send: Send) -> None:
        told = {"error": {"message": self.message, "type": self.kind, "param": None, "code": self.code}}
        body = json.dumps(told).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> str:
    """A request's header by its lower-case name: the first of several, "" of none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def has_header(scope: Scope, names: frozenset[bytes]) -> bool:
    return any(key in names for key, _ in scope["headers"])
