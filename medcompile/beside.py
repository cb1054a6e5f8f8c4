"""The original's answers, made beside the rest of a build, in a process of their own.

Tracing and quantizing keep one core busy, and torch is glad of the others. What the process makes comes through the
cache, so one that fails costs time and nothing else: the build then makes the answers itself, and tells what is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from medcompile.resources import available_cores, available_memory_bytes

SMALLEST_BYTES = 64 << 20
"""Of weights: below, a process of its own costs more than it brings."""
_ROOM = 4
"""Times the weights that must be free: they in float32, of which files may have half, and the build's own copies."""
_PAUSE_S = 0.05

_CODE = "from medcompile import beside, pipeline; beside.end_with_parent(); pipeline.answer(**beside.arguments())"


def pays(weights: Sequence[Path]) -> bool:
    """Whether a model with weights in these files is large enough for it, and this machine too."""
    size = sum(file.stat().st_size for file in weights)
    return size >= SMALLEST_BYTES and available_cores() > 1 and size * _ROOM < available_memory_bytes()


class Beside:
    """A process that runs pipeline.answer() with these arguments, from now on. A context manager: leaving ends it."""

    def __init__(self, arguments: Mapping[str, object]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(available_cores() - 1)},  # one core is the build's own
        )

    def wait(self, there: Callable[[], bool]) -> None:
        """Until what is waited for is there, or can't come from here any more."""
        while self._process.poll() is None and not there():
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


# ---- in that process


def arguments() -> dict[str, object]:
    found: dict[str, object] = json.loads(sys.argv[1])
    return found


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
