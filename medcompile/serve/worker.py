"""The process that runs one bundle: python -m medcompile.serve.worker FD NAME.

FD is its socket to the server; the model's name is there for whoever lists processes.

It loads the bundle, says that it is ready, and answers what comes until the server is gone. The model's work is in
worker_decoder.py and worker_encoder.py; here requests are read, and errors told.
Nothing that a client sent is ever printed, and a crash leaves no dump of memory.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from medcompile.errors import MedcompileError
from medcompile.runtime.session import GENERATE, Session, load
from medcompile.serve import logs
from medcompile.serve.desk import Desk, Line
from medcompile.serve.frames import Frame, received
from medcompile.serve.private import no_dumps

log = logging.getLogger("medcompile.serve.worker")


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops when it has drained, and the workers with it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    no_dumps()
    connection = socket.socket(fileno=descriptor)
    line = Line(connection)
    frames = received(connection)
    first = next(frames, None)
    if first is None:
        return
    number, told = first[0].header["id"], first[0].header
    logs.configure(told["log_level"], as_json=told["log_json"], worker=told["name"])
    try:
        session = _loaded(told)
        desk = _desk(session, line, told)
    except Exception as error:  # noqa: BLE001  # whatever keeps a bundle from loading is the server's to tell
        line.fail(number, error)
        return
    chosen = {"variant": session.variant.name, "target": session.target.name}
    line.send(({"id": number, **chosen, **desk.facts()}, b""))
    _serve(desk, line, chain([first[1:]], frames))
    os._exit(0)  # without waiting for a step that nobody reads


def _serve(desk: Desk, line: Line, read: Iterable[list[Frame]]) -> None:
    for frames in read:
        for frame in frames:
            _answer(desk, line, frame, alone=len(frames) == 1)


def _answer(desk: Desk, line: Line, frame: Frame, *, alone: bool) -> None:
    number, op = frame.header["id"], frame.header["op"]
    try:
        if op == "cancel":
            desk.cancel(number)
        elif op == "stats":
            line.send(({"id": number, **desk.stats()}, b""))
        else:
            desk.take(frame, alone=alone)
    except MedcompileError as error:
        line.fail(number, error)
    except Exception as error:  # a bug in one request must not end the others
        log.error("a request failed", exc_info=error)
        line.fail(number, error)


def _loaded(told: Mapping[str, Any]) -> Session:
    return load(
        told["path"],
        backend=told["backend"],
        variant=told["variant"],
        threads=told["threads"],
        kv_blocks=told["kv_blocks"],
    )


def _desk(session: Session, line: Line, told: Mapping[str, Any]) -> Desk:
    if GENERATE in session.bundle.graphs:
        from medcompile.serve.worker_decoder import DecoderDesk

        return DecoderDesk(session, line)
    from medcompile.serve.worker_encoder import EncoderDesk

    return EncoderDesk(session, line, told["text_tokens"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
