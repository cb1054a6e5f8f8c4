"""What this process may use of the machine, and has used: cores, memory, and peak resident memory (which Linux alone
tells exactly; elsewhere it is the peak since the start)."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int:
    """What processes may still take without swapping, in all and in this control group. 0 where nothing tells."""
    free = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        limit, used = (int((_CONTROL_GROUP / f"memory.{n}").read_text(encoding="ascii")) for n in ("max", "current"))
        free = min(free, limit - used)
    return free


def reset_peak_rss() -> None:
    """Start a new peak now, where the kernel can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_bytes() -> int:
    """The largest resident size since the last reset, or since the start of the process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
