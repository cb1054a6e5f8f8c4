"""Builds that die: whatever happens to their process, the caller gets an error with the last useful lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medcompile.backends import _tensorrt_job as tensorrt_job
from medcompile.backends._tensorrt_job import Job, run
from medcompile.errors import BackendError


def _run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 30) -> BackendError:
    """The error that comes of a build whose process runs that code."""
    monkeypatch.setattr(tensorrt_job, "_command", lambda: [sys.executable, "-c", code])
    job = Job("no_library", "embed.onnx", [], [])
    with pytest.raises(BackendError) as caught:
        run(job, folder, "TensorRT-RTX, graph embed of variant int8", timeout_s, folder)
    return caught.value


def test_a_killed_build_names_the_signal_and_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; print('progress: Optimizing graph', flush=True); os.kill(os.getpid(), 9)"
    error = _run(code, tmp_path, monkeypatch)
    assert "graph embed of variant int8: the build died of SIGKILL (Killed) (phase: Optimizing graph)" in str(error)
    assert "memory" in error.fix


def test_an_abort_shows_the_logs_errors_and_what_was_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os
open("log", "w").write("VERBOSE chatter\\nERROR node x: unsupported\\nVERBOSE more\\n")
print("terminate called without an active exception", flush=True)
os.abort()
"""
    error = str(_run(code, tmp_path, monkeypatch))
    assert "SIGABRT" in error
    assert "ERROR node x: unsupported" in error
    assert "terminate called without an active exception" in error
    assert "chatter" not in error


def test_a_build_that_hangs_is_ended_and_says_how_to_give_it_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = _run("import time; print('progress: parsing', flush=True); time.sleep(60)", tmp_path, monkeypatch, 1.0)
    assert "still not built after 1 s (phase: parsing)" in str(error)
    assert "build_timeout_s" in error.fix


def test_an_exception_in_the_script_keeps_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = str(_run("raise RuntimeError('library broken')", tmp_path, monkeypatch))
    assert "exit code 1" in error
    assert "RuntimeError: library broken" in error
