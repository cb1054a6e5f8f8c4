"""What a machine tells of itself, on this one and on ones that are made up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medcompile.bench import machine


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two packages, one with a part of its own, and no GPU."""
    for zone, joules in (("intel-rapl:0", 3.0), ("intel-rapl:1", 4.0), ("intel-rapl:0:0", 100.0)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    monkeypatch.setattr(machine, "_POWERCAP", tmp_path)
    monkeypatch.setattr(machine, "nvml", lambda: None)
    machine._rapl_zones.cache_clear()
    yield tmp_path
    machine._rapl_zones.cache_clear()


def test_energy_is_the_sum_of_the_packages_and_counts_no_part_twice(powercap: Path) -> None:
    assert machine.energy_j() == pytest.approx(7.0)
    assert machine.energy_sources() == ("rapl", "no NVIDIA device")


def test_without_a_meter_there_is_no_energy_and_a_reason(
    powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_POWERCAP", tmp_path / "nowhere")
    machine._rapl_zones.cache_clear()
    assert machine.energy_j() is None
    assert machine.energy_sources() == ("", "no RAPL meter in /sys/class/powercap; no NVIDIA device")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_busy_time_of_the_cores_grows_with_work_and_clock_and_memory_are_told() -> None:
    before = machine.busy_s(machine.cpus())
    spins = [machine.spin_ms() for _ in range(50)]
    after = machine.busy_s(machine.cpus())
    assert before is not None and after is not None
    assert after[0] > before[0]
    assert all(ms > 0 for ms in spins)
    assert machine.rss_bytes(peak=True) >= machine.rss_bytes() > 10**6
    assert machine.busy_s([99_999]) is None
    assert {"cores", "arch", "memory"} <= set(machine.facts())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_begins_anew() -> None:
    grown = bytearray(200 << 20)
    grown[:: 1 << 12] = b"x" * len(grown[:: 1 << 12])
    high = machine.rss_bytes(peak=True)
    del grown
    machine.reset_peak()
    assert machine.rss_bytes(peak=True) < high - (100 << 20)
