"""A model hub on this machine: what huggingface_hub asks of the real one to list tags and to download files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """One repository, `owner/name`. `requests`: method, path and range of each that came."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    tags: tuple[str, ...] = ("v1",)
    breaks: dict[str, int] = field(default_factory=dict)  # file: where its first download breaks off
    stalls: set[str] = field(default_factory=set)  # files that break off by saying no more until the client has gone
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    @property
    def revisions(self) -> set[str]:
        return {"main", "dev", self.commit, *self.tags}

    def asked(self, file: str) -> list[str | None]:
        """The ranges in which the file was fetched."""
        return [part for method, path, part in self.requests if method == "GET" and path.endswith(f"/{file}")]


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub with the files of `folder`."""
    hub = Hub({path.name: path.read_bytes() for path in folder.iterdir()})
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the test's stderr."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if path == "/api/models/owner/name/refs":
            self._send(200, json.dumps(self._refs()).encode(), {"Content-Type": "application/json"})
            return
        repository, _, place = path.removeprefix("/").partition("/resolve/")
        revision, _, file = place.partition("/")
        if repository != "owner/name":
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.hub.revisions:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file not in self.hub.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.hub.commit})
        else:
            self._send_file(file, body)

    def _refs(self) -> dict[str, list[dict[str, str]]]:
        def described(kind: str, names: tuple[str, ...]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": self.hub.commit} for name in names]

        return {
            "tags": described("tags", self.hub.tags),
            "branches": described("heads", ("main", "dev")),
            "converts": [],
        }

    def _send_file(self, file: str, body: bool) -> None:
        content = self.hub.files[file]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit}
        part = self.headers.get("Range")
        if not body or part is None:
            self._send(200, content, headers, until=self.hub.breaks.pop(file, None) if body else 0)
            return
        start = int(part.removeprefix("bytes=").partition("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str], until: int | None = None) -> None:
        """`until`: the connection breaks after so many bytes of the content."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:until])
            self.close_connection = until is not None
            if until is not None and self.path.rpartition("/")[2] in self.hub.stalls:
                self.wfile.flush()
                with suppress(ConnectionError):
                    self.connection.recv(1)
