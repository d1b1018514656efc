"""A hub on this machine: the calls of the hub's HTTP API that ``huggingface_hub`` makes for a download. It can break
a transfer in the middle, and it remembers what it was asked."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

COMMIT = "abcdef0123456789abcdef0123456789abcdef01"


class HubServer:
    """Serves one model, ``team/pony``, whose branch ``main`` is at COMMIT.

    Args:
        files: name → content.
        break_after: of the first GET of a file's content, send so many bytes and cut the connection; None never.
    """

    def __init__(self, files: dict[str, bytes], break_after: dict[str, int] | None = None) -> None:
        self.files = files
        self.break_after = dict(break_after or {})
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, Range header)."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def ranges(self, name: str) -> list[str]:
        """The Range header of every GET of the file's content."""
        return [ranged for method, path, ranged in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append(("GET", self.path, self.headers.get("Range", "")))
                path = self.path.split("?")[0]
                if match := re.fullmatch(r"/team/pony/resolve/(\w+)/(.+)", path):
                    hub.send_file(self, match[1], match[2])
                elif re.fullmatch(rf"/api/models/team/pony/tree/{COMMIT}", path):
                    hub.send_json(self, [_tree_entry(name, content) for name, content in hub.files.items()])
                elif re.fullmatch(rf"/api/models/team/pony(/revision/(main|{COMMIT}))?", path):
                    siblings = [{"rfilename": name} for name in hub.files]
                    hub.send_json(self, {"id": "team/pony", "sha": COMMIT, "siblings": siblings})
                elif path.startswith("/api/models/team/pony/revision/"):
                    hub.send_missing(self, "RevisionNotFound")
                else:
                    hub.send_missing(self, "RepoNotFound")

            def do_HEAD(self) -> None:
                hub.requests.append(("HEAD", self.path, self.headers.get("Range", "")))
                match = re.fullmatch(r"/team/pony/resolve/(\w+)/(.+)", self.path.split("?")[0])
                if match is None or match[2] not in hub.files:
                    hub.send_missing(self, "EntryNotFound")
                    return
                content = hub.files[match[2]]
                _send_head(self, 200, content, len(content))

            def log_message(self, format: str, *arguments: object) -> None:
                """Quiet."""

        return Handler

    def send_file(self, handler: BaseHTTPRequestHandler, revision: str, name: str) -> None:
        if revision != COMMIT or name not in self.files:
            self.send_missing(handler, "EntryNotFound")
            return
        content = self.files[name]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        _send_head(handler, 206 if match else 200, content, len(content) - start)
        limit = self.break_after.pop(name, None)
        handler.wfile.write(content[start : start + limit] if limit is not None else content[start:])
        if limit is not None:
            handler.close_connection = True
            handler.wfile.flush()
            handler.connection.close()

    @staticmethod
    def send_json(handler: BaseHTTPRequestHandler, value: object) -> None:
        body = json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    @staticmethod
    def send_missing(handler: BaseHTTPRequestHandler, code: str) -> None:
        handler.send_response(404)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}


def _send_head(handler: BaseHTTPRequestHandler, status: int, content: bytes, num_bytes: int) -> None:
    handler.send_response(status)
    handler.send_header("ETag", f'"{_etag(content)}"')
    handler.send_header("X-Repo-Commit", COMMIT)
    handler.send_header("Accept-Ranges", "bytes")
    handler.send_header("Content-Length", str(num_bytes))
    if status == 206:
        start = len(content) - num_bytes
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.end_headers()
