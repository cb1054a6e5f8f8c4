"""What keeps texts that a process holds in memory from being written to a disk when it dies."""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4


def no_dumps() -> None:
    """No core file, and on Linux none through a crash handler either; other users' debuggers can't attach."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
