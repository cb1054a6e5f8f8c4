"""benchmarks/gpu.sh without a GPU: what it says, and, with a stand-in for each program, what it does and writes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TITLES = (
    "Device",
    "Does TensorRT-RTX take it?",
    "Tests on the device",
    "Quickstart, built for the GPU",
    "Quickstart, verified on the device",
    "BERT-base latency",
)


def program(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def run(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as a copy of its own in place, so that nothing is written into the checkout."""
    (place / "benchmarks").mkdir(exist_ok=True)
    copy = Path(shutil.copy(SCRIPT, place / "benchmarks"))
    given = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(
        ["bash", str(copy), *arguments], capture_output=True, text=True, env=given, timeout=60, check=False
    )


def test_the_script_has_no_fault_of_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("there", [False, True])
def test_without_a_gpu_it_says_so_writes_nothing_and_exits_with_1(tmp_path: Path, there: bool) -> None:
    body = "echo 'NVIDIA-SMI has failed'; exit 9" if there else "exit 127"
    program(tmp_path / "bin", "nvidia-smi", body)
    done = run(tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "there is no NVIDIA GPU here" in done.stderr
    assert "fix: run it on a machine with a GPU" in done.stderr
    assert not (tmp_path / "benchmarks" / "results").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_device_every_step_is_run_and_written_with_the_hardware_named(tmp_path: Path, fails: bool) -> None:
    program(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3'")
    python = program(
        tmp_path,
        "python",
        f'echo "$@" >> {tmp_path}/calls\n'
        'case "$*" in *gpu_latency*) for last in "$@"; do :; done; echo "| the table |" > "$last";; esac\n'
        f'case "$*" in *"-m gpu"*) echo 1 failed; exit {int(fails)};; esac; echo "in $PWD"',
    )
    done = run(tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON=str(python))
    assert done.returncode == int(fails), done.stderr
    result = (tmp_path / "benchmarks/results/gpu-nvidia-h100-80gb-hbm3.md").read_text(encoding="utf-8")
    assert result.startswith("# NVIDIA H100 80GB HBM3\n")
    assert [line[3:] for line in result.splitlines() if line.startswith("## ")] == [*TITLES, "The table"]
    assert result.count("Failed with exit status 1") == int(fails)
    assert "| the table |" in result
    assert str(tmp_path) not in result
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    for words in ("gpu_accepts.py", "-m pytest -m gpu", "targets=[tensorrt-rtx, onnxruntime-cuda]", "main() verify"):
        assert words in calls


def test_the_results_may_be_named_by_hand(tmp_path: Path) -> None:
    program(tmp_path / "bin", "nvidia-smi", "echo GPU")
    python = program(tmp_path, "python", "exit 0")
    assert run(tmp_path, "mine", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON=str(python)).returncode == 0
    assert (tmp_path / "benchmarks/results/gpu-mine.md").is_file()
