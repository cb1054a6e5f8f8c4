"""A contender's process from outside: start it, ask it, stop it in between, and leave nothing of it behind.

Whatever it does (crash, hang, print, be killed) becomes a ContenderError that says so; the harness lives on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from medcompile.bench import worker
from medcompile.errors import MedcompileError

_TAIL_LINES = 3
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OPENVINO_TELEMETRY_OPT_OUT": "1"}


class ContenderError(MedcompileError):
    """A contender failed. fatal: its process is gone, or can no longer be trusted with a question."""

    def __init__(self, message: str, *, fatal: bool) -> None:
        super().__init__(message)
        self.fatal = fatal


class Process:
    """worker.py with one contender, in a process group of its own. A context manager: leaving kills the group.

    python: the interpreter. log: the file that gets all it prints. threads: what libraries read from the environment.
    """

    def __init__(self, python: str, arguments: Sequence[str], log: Path, threads: int) -> None:
        self._log = log
        environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads)) | _QUIET
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        command = [python, "-P", str(Path(worker.__file__)), *arguments]
        with log.open("ab") as errors:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise ContenderError(f"{python}: {error.strerror}", fatal=True) from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._unread = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:  # a request's own, as JSON
        """Send a request and wait for its answer. Raises ContenderError: not fatal where the contender says itself
        what went wrong; fatal where it died, or did not answer in time and was killed."""
        self._signal(signal.SIGCONT)
        try:
            os.write(self._in, json.dumps({"do": do} | arguments).encode() + b"\n")
        except OSError:
            raise self._died() from None
        return self.answer(timeout_s, do)

    def answer(self, timeout_s: float, doing: str) -> dict[str, Any]:
        """The next line that it writes. Raises as ask() does."""
        end = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise ContenderError(f"did not answer within {timeout_s:.0f} s ({doing}) and was killed", fatal=True)
            read = os.read(self._out, 1 << 16)
            if not read:
                raise self._died()
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        told: Mapping[str, Any] = json.loads(line)
        if "error" in told:
            raise ContenderError(str(told["error"]), fatal=False)
        return dict(told)

    def pause(self) -> None:
        """Stop every thread of it until it is asked again: what spins while it waits would disturb the others."""
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Kill the whole group. Safe to call twice."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout):
            if end is not None:
                end.close()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # gone, or (macOS) a zombie
            return

    def _died(self) -> ContenderError:
        self._signal(signal.SIGKILL)
        code = self._process.wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (too little memory?)"
        return ContenderError(f"{how}{_tail(self._log)}", fatal=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "; it said: " + " / ".join(lines[-_TAIL_LINES:])[-600:] if lines else ""
