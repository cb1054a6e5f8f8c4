"""A local server that speaks the hub's protocol, as far as the hub client asks for it, with faults on demand.

Endpoints: GET /api/models/{repo}, its /revision/{rev} and /tree/{rev}, HEAD and GET /{repo}/resolve/{rev}/{file}.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 20_000  # from here on a file counts as LFS, and its ETag is its sha256


@dataclass
class Hub:
    """What is served, and how it fails. repos: name -> file name -> bytes, all at COMMIT, which is also 'main'.

    cut: file name -> byte counts; each GET of that file takes one off and breaks the connection after so many bytes.
    gated: repositories whose files need token. missing: files that are listed but not there. down: a status that every
    request gets. redirect: where large files lie, as a CDN. portal: a page that answers everything.
    seen, tokens, agents: what requests asked for and sent, in order.
    """

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    token: str = "hf_right"
    gated: set[str] = field(default_factory=set)
    cut: dict[str, list[int]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    down: int = 0
    redirect: str = ""
    portal: bytes = b""
    seen: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)

    def asked(self, part: str) -> list[str]:
        """The requests, as 'METHOD path range', that contain part."""
        return [line for line in self.seen if part in line]


@contextmanager
def serve(repos: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Run a Hub on a free local port for as long as the block lasts."""
    hub = Hub(repos)

    class Request(_Request):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files under a folder, as a repository serves them."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class _Request(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.served, unquote(urlsplit(self.path).path)
        hub.seen.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        hub.tokens.append(self.headers.get("Authorization"))
        hub.agents.append(self.headers.get("User-Agent", ""))
        if hub.down:
            return self._fail(hub.down, "", "down")
        if hub.portal:
            return self._send_page(hub.portal, "text/html")
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in hub.repos:
            return self._fail(401 if api else 404, "RepoNotFound", "Repository not found")
        if api and not rest:
            rest = ["revision", "main"]
        if len(rest) < 2:
            return self._fail(404, "", "no such endpoint")
        if rest[1] not in (COMMIT, "main"):
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        files = hub.repos[name]
        if api:
            return self._send_json(files, rest[0], name)
        if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            status = 401 if "Authorization" not in self.headers else 403
            return self._fail(status, "GatedRepo", "Access to this model is restricted")
        file = "/".join(rest[2:])
        if rest[0] != "resolve" or file not in files or file in hub.missing:
            return self._fail(404, "EntryNotFound", "Entry not found")
        return self._send_file(file, files[file], body=body)

    def _fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, files: dict[str, bytes], endpoint: str, name: str) -> None:
        answer: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        if endpoint == "tree":
            answer = [_tree_entry(file, content) for file, content in files.items()]
        self._send_page(json.dumps(answer).encode(), "application/json")

    def _send_page(self, text: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _send_file(self, file: str, content: bytes, *, body: bool) -> None:
        start, span = 0, self.headers.get("Range")
        if span:
            start = int(span.removeprefix("bytes=").rstrip("-"))
        away = self.served.redirect if len(content) >= LARGE_BYTES else ""
        self.send_response(302 if away else 206 if span else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_oid(content)}"')
        if len(content) >= LARGE_BYTES:
            self.send_header("X-Linked-Etag", f'"{_oid(content)}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if away:
            self.send_header("Location", away + file)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        cuts = self.served.cut.get(file)
        if cuts:
            self.wfile.write(content[start : start + cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[start:])


def _oid(content: bytes) -> str:
    """The blob's name: sha256 for LFS files, git's sha1 for the others."""
    if len(content) >= LARGE_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _tree_entry(file: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": file, "size": len(content), "oid": _oid(content)[:40]}
    if len(content) >= LARGE_BYTES:
        entry["lfs"] = {"oid": _oid(content), "size": len(content), "pointerSize": 134}
    return entry
