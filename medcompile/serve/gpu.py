"""Memory and load of NVIDIA GPUs for /metrics, through NVML. Without a GPU or its library, nothing is told.

NVML is asked when /metrics is read, and at most once a second however often that is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

FRESH_S = 1.0

_FAMILIES = {
    "used_bytes": ("medcompile_gpu_memory_used_bytes", "GPU memory in use, by every process."),
    "total_bytes": ("medcompile_gpu_memory_bytes", "GPU memory there is."),
    "utilization": ("medcompile_gpu_utilization_ratio", "Share of the last moment in which a kernel ran."),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    index: int
    used_bytes: int
    total_bytes: int
    utilization: float


class GpuCollector(Collector):
    """nvml: the pynvml module or one like it; default, the real one if it is here and finds a driver."""

    def __init__(self, nvml: ModuleType | None = None) -> None:
        self._nvml = nvml or _nvml()
        self._lock = threading.Lock()
        self._read_s = float("-inf")
        self._gpus: list[Gpu] = []
        if self._nvml is not None:
            try:
                self._nvml.nvmlInit()
            except self._nvml.NVMLError:  # the library without a driver
                self._nvml = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gpus = self._now()
        for field, (name, told) in _FAMILIES.items():
            family = GaugeMetricFamily(name, told, labels=("gpu",))
            for gpu in gpus:
                family.add_metric((str(gpu.index),), getattr(gpu, field))
            yield family

    def _now(self) -> list[Gpu]:
        if self._nvml is None:
            return []
        with self._lock:
            if time.monotonic() - self._read_s >= FRESH_S:
                self._gpus = _read(self._nvml)
                self._read_s = time.monotonic()
            return self._gpus


def _nvml() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    found: ModuleType = pynvml
    return found


def _read(nvml: ModuleType) -> list[Gpu]:
    found = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
            try:
                utilization = nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            except nvml.NVMLError:  # a slice of a GPU (MIG) has memory of its own, but tells no load
                utilization = float("nan")
            found.append(Gpu(index, int(memory.used), int(memory.total), utilization))
    except nvml.NVMLError as error:  # a driver that is being replaced, a GPU that fell off the bus
        log.warning("NVML: %s", type(error).__name__)
    return found
