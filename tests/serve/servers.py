"""The real server in a process of its own, for tests that ask it over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import openai

from tests import command_line


class Server:
    """`medcompile serve` with these arguments on any free port, from __enter__ to __exit__. said: its stderr so far."""

    def __init__(self, *arguments: object, key: str = "none", verify: Any = True) -> None:
        self.said: list[str] = []
        self.key = key
        self._arguments = arguments
        self._verify = verify
        self.url = ""

    def __enter__(self) -> Self:
        self.process = command_line.start("serve", *self._arguments, "--port", 0)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: self.url or self.process.poll() is not None, 120)
        assert self.url, "".join(self.said)
        self.http = httpx.Client(
            base_url=self.url, timeout=60, verify=self._verify, headers={"Authorization": f"Bearer {self.key}"}
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.stop()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"^(https?://\S+)/v1 takes requests", line):
                self.url = found.group(1)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code, once it has ended by this signal."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0} | options)

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**{"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0} | options)

    def post(self, url: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(url, json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a series of /metrics over all labels but these."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.match(rf"{name}(?:{{(.*)}})? (\S+)$", line)
            if found and all(f'{k}="{v}"' in (found.group(1) or "") for k, v in labels.items()):
                total += float(found.group(2))
        return total

    def events(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.said if line.startswith("{")]

    def workers(self) -> dict[str, int]:
        """The processes of its models, by their names."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        told = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in children}
        return {words[4]: int(pid) for pid, words in told.items() if "medcompile.serve.worker" in words}


def wait_for(true: Callable[[], Any], timeout_s: float = 20) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)
