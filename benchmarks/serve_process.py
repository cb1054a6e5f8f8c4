"""Servers for the benchmarks, each a process of its own: ours, transformers behind the same HTTP, llama.cpp's.

`python benchmarks/serve_process.py transformers CHECKPOINT PORT` is the second of them: Starlette and uvicorn with the
route /v1/completions, streamed, that answers one request after another by transformers' generate.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STARTS_S = 300


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[str]:
    """`medcompile serve` with these arguments; its URL."""
    command = [sys.executable, "-c", "from medcompile.cli import main; main()", "serve"]
    command += [*map(str, arguments), "--port", "0", "--log-level", "ERROR"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.match(r"(http://\S+)/v1 takes requests", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found.group(1)
                return
        raise RuntimeError(f"{command} did not start")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def listening(command: Sequence[object], port: int, health: str) -> Iterator[str]:
    """Another's server, once its health route answers; its URL."""
    url = f"http://127.0.0.1:{port}"
    with Path("/dev/null").open("w") as nowhere:
        process = subprocess.Popen([str(c) for c in command], stdout=nowhere, stderr=nowhere)
        try:
            end_s = time.monotonic() + STARTS_S
            while not _answers(url + health):
                if process.poll() is not None or time.monotonic() > end_s:
                    raise RuntimeError(f"{command[0]} did not start")
                time.sleep(0.2)
            yield url
        finally:
            process.kill()  # asked to end, uvicorn would first answer whoever still waits
            process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def transformers_server(checkpoint: Path) -> contextlib.AbstractContextManager[str]:
    port = free_port()
    return listening([sys.executable, __file__, "transformers", checkpoint, port], port, "/health")


def llama_server(binary: Path, gguf: Path, slots: int, context: int, threads: int) -> Any:
    """llama.cpp's own server, with continuous batching (its default) and a slot for each client."""
    port = free_port()
    command = [binary, "-m", gguf, "--port", port, "--parallel", slots, "--ctx-size", slots * context]
    command += ["--threads", threads, "--threads-batch", threads, "--cont-batching", "--no-webui"]
    return listening(command, port, "/health")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# ---- transformers behind HTTP


def serve_transformers(checkpoint: Path, port: int) -> None:
    import torch
    import transformers
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    turn = threading.Lock()

    class Tokens(transformers.generation.streamers.BaseStreamer):
        """Token ids as they come; the prompt's are the first."""

        def __init__(self) -> None:
            from queue import SimpleQueue

            self.queue: SimpleQueue[int | None] = SimpleQueue()
            self._first = True

        def put(self, value: Any) -> None:
            if not self._first:
                self.queue.put(int(value.reshape(-1)[-1]))
            self._first = False

        def end(self) -> None:
            self.queue.put(None)

    def generate(ids: list[int], tokens: int, streamer: Tokens) -> None:
        with turn, torch.inference_mode():
            prompt = torch.tensor([ids])
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                streamer=streamer,
                pad_token_id=0,
            )

    async def health(_: Request) -> Response:
        return Response("ok")

    async def complete(request: Request) -> StreamingResponse:
        asked = await request.json()
        streamer = Tokens()
        thread = threading.Thread(target=generate, args=(asked["prompt"], asked["max_tokens"], streamer))
        thread.start()

        def pieces() -> Iterator[bytes]:
            while (token := streamer.queue.get()) is not None:
                yield b"data: %s\n\n" % json.dumps({"choices": [{"index": 0, "text": f" {token}"}]}).encode()
            yield b"data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    routes = [Route("/health", health), Route("/v1/completions", complete, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error")


if __name__ == "__main__":
    serve_transformers(Path(sys.argv[2]), int(sys.argv[3]))
