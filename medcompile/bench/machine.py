"""What this machine tells of itself: memory, clock, other load, heat, energy. Standard library only, Linux first.

Whatever a system does not tell is None, and why is said once by the caller. Nothing here knows of contenders.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")
_SPIN = bytes(1 << 20)


def cpus() -> tuple[int, ...]:
    """The cores that this process may use, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def facts() -> dict[str, str]:
    """The hardware and the system, in words."""
    told = {"system": f"{platform.system()} {platform.release()}", "arch": platform.machine()}
    info = _text("/proc/cpuinfo")
    for line in info.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            told["cpu"] = value.strip()
        if name.strip() in ("flags", "Features"):
            wanted = (
                "avx2",
                "avx512f",
                "avx512_vnni",
                "avx_vnni",
                "avx512_bf16",
                "amx_int8",
                "amx_bf16",
                "i8mm",
                "bf16",
            )
            told["instructions"] = " ".join(w for w in wanted if w in value.split())
    told["cores"] = str(len(cpus()))
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal"):
            told["memory"] = f"{int(line.split()[1]) / 2**20:.1f} GiB"
    if gpu := nvml():
        told["gpu"] = gpu.name
    return told


def rss_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process now, or the most since reset_peak()."""
    for line in _text("/proc/self/status").splitlines():
        if line.startswith("VmHWM" if peak else "VmRSS"):
            return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def reset_peak() -> None:
    """Let the peak begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def spin_ms() -> float:
    """Milliseconds of a fixed piece of arithmetic on one core, the best of three: only the clock's speed changes it."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        hashlib.sha256(_SPIN).digest()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def busy_s(cores: Iterable[int]) -> tuple[float, float] | None:
    """Seconds that these cores have worked since the system began, for anybody; and those that a hypervisor took."""
    rows = {line.split()[0]: line.split()[1:] for line in _text("/proc/stat").splitlines() if line.startswith("cpu")}
    tick = os.sysconf("SC_CLK_TCK")
    try:
        found = [[int(v) / tick for v in rows[f"cpu{core}"]] for core in cores]
    except (KeyError, ValueError):
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    return sum(f[0] + f[1] + f[2] + f[5] + f[6] for f in found), sum(f[7] for f in found)


def throttled() -> int | None:
    """How often cores were slowed for heat since the system began; None where that is not told."""
    counts = [
        _text(str(p)) for p in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    ]
    return sum(int(c) for c in counts if c.strip()) if counts else None


def energy_sources() -> tuple[str, str]:
    """Which meters can be read (rapl, nvml; both; empty), and why others can't."""
    why = []
    zones = _rapl_zones()
    if not zones:
        there = _POWERCAP.is_dir() and any(_POWERCAP.glob("intel-rapl:*"))
        why.append("RAPL is only for root here" if there else "no RAPL meter in /sys/class/powercap")
    gpu = nvml()
    if gpu is None:
        why.append("no NVIDIA device")
    elif gpu.energy_j() is None:
        why.append("the GPU has no energy counter")
    have = [name for name, found in (("rapl", zones), ("nvml", gpu and gpu.energy_j() is not None)) if found]
    return "+".join(have), "; ".join(why)


def energy_j() -> float | None:
    """Joules used so far by the whole packages and GPU; differences count. None without a meter."""
    parts = [int(_text(str(zone / "energy_uj"))) / 1e6 for zone in _rapl_zones()]
    gpu = nvml()
    if gpu is not None and (used := gpu.energy_j()) is not None:
        parts.append(used)
    return sum(parts) if parts else None


@cache
def _rapl_zones() -> tuple[Path, ...]:
    zones = [z for z in sorted(_POWERCAP.glob("intel-rapl:*")) if z.name.count(":") == 1]
    return tuple(z for z in zones if os.access(z / "energy_uj", os.R_OK) and _text(str(z / "energy_uj")).strip())


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA device, asked through the driver's own library."""

    library: ctypes.CDLL
    device: ctypes.c_void_p
    name: str

    def used_bytes(self) -> int:
        """Memory in use on the device, by anybody."""
        memory = _Memory()
        return memory.used if self.library.nvmlDeviceGetMemoryInfo(self.device, ctypes.byref(memory)) == 0 else 0

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None where the device does not count."""
        used = ctypes.c_ulonglong()
        good = self.library.nvmlDeviceGetTotalEnergyConsumption(self.device, ctypes.byref(used)) == 0
        return used.value / 1e3 if good else None


@cache
def nvml() -> Gpu | None:
    """The first NVIDIA device; None without one, or without a driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0:
        return None
    library.nvmlDeviceGetName(device, name, len(name))
    return Gpu(library, device, name.value.decode(errors="replace"))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
