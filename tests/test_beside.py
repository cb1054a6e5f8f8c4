"""The original's answers beside the rest of a build: who makes them, and what becomes of that process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medcompile import beside
from medcompile.beside import Beside
from medcompile.models.bert import Bert
from tests import tiny
from tests.tiny import Events, Workshop


@pytest.fixture
def every_model_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(beside, "available_cores", lambda: 2)


def build(workshop: Workshop, tmp_path: Path) -> Events:
    events = Events()
    workshop.build(out=tmp_path / "out", cache_folder=tmp_path / "cache", progress=events)
    assert "reference embed" in events.began
    return events


@pytest.mark.usefixtures("every_model_pays")
def test_answers_come_from_the_other_process_and_are_the_same(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*_: Any) -> Any:
        raise AssertionError("the build made the answers itself")

    monkeypatch.setattr(Bert, "reference", here)
    build(small, tmp_path)
    kept = "reference/embed.npz"
    assert tiny.contents(tmp_path / "out")[kept] == tiny.contents(small.bundle)[kept]


@pytest.mark.usefixtures("every_model_pays")
def test_a_process_that_fails_costs_nothing_but_time(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "_CODE", "raise SystemExit(1)")
    build(small, tmp_path)
    assert (tmp_path / "out" / "reference" / "embed.npz").is_file()


def test_a_small_model_or_a_small_machine_has_no_process_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(beside.SMALLEST_BYTES)
    monkeypatch.setattr(beside, "available_cores", lambda: 2)
    monkeypatch.setattr(beside, "available_memory_bytes", lambda: 1 << 40)
    assert beside.pays([weights])
    assert not beside.pays([])
    monkeypatch.setattr(beside, "available_memory_bytes", lambda: 1 << 20)
    assert not beside.pays([weights])
    monkeypatch.setattr(beside, "available_memory_bytes", lambda: 1 << 40)
    monkeypatch.setattr(beside, "available_cores", lambda: 1)
    assert not beside.pays([weights])


def test_leaving_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_CODE", "import time; time.sleep(600)")
    with Beside({}) as running:
        process = running._process
        assert process.poll() is None
    assert process.poll() == -signal.SIGKILL


PARENT = """
import time
from medcompile import beside
beside._CODE = "from medcompile import beside; import time; beside.end_with_parent(); time.sleep(600)"
print(beside.Beside({})._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
def test_the_process_ends_when_its_build_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}/status").is_file() and time.monotonic() < end:
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()
