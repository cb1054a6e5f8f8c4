"""Doctor: what this machine can build and run, each with the exact fix where it can't."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from medcompile import backends
from medcompile.errors import BackendUnavailable
from medcompile.resources import available_cores

_BUILD_LIBRARIES = {
    "torch": "torch",
    "transformers": "transformers",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "onnxruntime": "onnxruntime",
}
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_DISK_WANTED_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is good, what was found, and the fix where it is not."""

    what: str
    good: bool
    found: str
    fix: str = ""

    def told(self) -> str:
        return self.found if self.good or not self.fix else f"{self.found}; fix: {self.fix}"


def examine() -> list[Finding]:
    """Look at the machine, the libraries that build, every backend's targets, the cache and the hub's settings."""
    return [_cpu(), _memory(), _build(), _kernels(), *_targets(), _cache(), _hub()]


def machine() -> str:
    """The system, its processor and what that is good at, in words; no name of the machine."""
    return _cpu().found


def _cpu() -> Finding:
    flags: set[str] = set()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            break
    fast = [name for name in _INSTRUCTIONS if name in flags]
    cores = available_cores()
    known = f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}"
    if not flags:
        return Finding("machine", True, f"{known}, instruction sets not told")
    int8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"} & flags
    return Finding(
        "machine",
        bool(int8),
        f"{known}, {' '.join(fast) or 'no vector instructions'}",
        "" if int8 else "this CPU has no 8-bit dot product: int8 variants save memory here, but may not be faster",
    )


def _memory() -> Finding:
    table = dict(line.split(":", 1) for line in _lines("/proc/meminfo"))
    available = int(table["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in table else 0
    if not available:
        return Finding("memory", True, "not told by this system")
    return Finding(
        "memory",
        available > 2 * 10**9,
        f"{available / 1e9:.1f} GB available",
        "building wants 2 GB; close other programs",
    )


def _build() -> Finding:
    missing = [dist for name, dist in _BUILD_LIBRARIES.items() if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("build", False, f"missing: {', '.join(missing)}", 'pip install "medcompile[build]"')
    versions = (f"{dist} {importlib.metadata.version(dist)}" for dist in ("torch", "transformers", "onnx-ir"))
    return Finding("build", True, f"recipes can be built here ({', '.join(versions)})")


def _kernels() -> Finding:
    from medcompile.kernels import native

    try:
        return Finding("kernels", True, f"medcompile's own on onnxruntime-cpu, {native.instruction_set()}")
    except BackendUnavailable as error:
        return Finding("kernels", False, error.message, error.fix)


def _targets() -> list[Finding]:
    findings = []
    for name in backends.names():
        backend = backends.get(name)
        for target in backend.targets:
            try:
                found = backend.probe(target)
            except BackendUnavailable as error:
                findings.append(Finding(f"target {target}", False, error.message, error.fix))
            else:
                place = (
                    f"on {found.device} {found.arch}".rstrip()
                    if found.present
                    else f"builds, but no {found.device} device to run on"
                )
                findings.append(Finding(f"target {target}", True, f"{found.backend} {found.version} {place}"))
    return findings


def _cache() -> Finding:
    from medcompile.sources import default_cache

    folder = default_cache()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    told = f"{folder}, {free / 1e9:.0f} GB free on its disk"
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding("cache", False, told, "set MEDCOMPILE_CACHE to a folder that can be written")
    return Finding("cache", free > _DISK_WANTED_BYTES, told, "free some disk space")


def _hub() -> Finding:
    place = os.environ.get("HF_ENDPOINT", "the hub client's default")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding(
            "hub", False, "HF_HUB_OFFLINE is set: only cached models", "unset HF_HUB_OFFLINE to fetch models"
        )
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no token in HF_TOKEN; public models need none"
    return Finding("hub", True, f"hf: sources come from {place}; {token}")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
