"""What a worker's two kinds of desk share: their face, and the way to the server."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from medcompile.errors import UsageError
from medcompile.runtime.session import Session
from medcompile.serve.failures import sent
from medcompile.serve.frames import Frame, packed


class Desk(Protocol):
    """What answers requests: a decoder's or an encoder's. Called from the one thread that reads the socket."""

    def facts(self) -> dict[str, Any]:
        """What the server should know of the model."""

    def take(self, frame: Frame, *, alone: bool) -> None:
        """Begin with a request; its answer is sent when it is there. Raises what is wrong with it.

        alone: no other request came with it.
        """

    def cancel(self, number: int) -> None:
        """Forget a request. Nothing happens for one that is answered."""

    def stats(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Line:
    """The way to the server; threads may share it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, *frames: tuple[Mapping[str, Any], bytes | memoryview]) -> None:
        """All of them at once. A server that is gone needs no answer."""
        data = b"".join(packed(header, body) for header, body in frames)
        with self._lock:
            try:
                self._connection.sendall(data)
            except OSError:
                os._exit(0)  # the server is gone, and whatever runs here runs for nobody

    def fail(self, number: int, error: BaseException) -> None:
        self.send(({"id": number, "error": sent(error)}, b""))


def unknown(op: str, session: Session) -> UsageError:
    return UsageError(
        f"{session.bundle.name} does not do this ({op}); its tasks are: {', '.join(session.bundle.tasks)}",
        fix="ask another model; /v1/models tells each one's tasks",
    )
