"""An API server of a few resources: lists, and watches that resume at a version, are cut off, or come too late.

It does not check what it is given: no schemas, no RBAC, no admission, no defaults. What it does is what
https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes says of lists and watches.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]

GONE = {"kind": "Status", "status": "Failure", "reason": "Expired", "message": "too old resource version", "code": 410}


class ApiServer:
    """Objects by the path of their list, for example ``/api/v1/nodes``. From any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 100
        self._oldest = 100
        self._objects: dict[str, dict[str, Json]] = {}
        self._events: list[tuple[int, str, str, Json]] = []
        self._cut = 0
        """How often all watches were cut off."""
        self.is_away = False
        """Connections that are still open end with their next request."""
        self.is_garbled = False
        """Lists are answered as a proxy does that has something to say itself."""
        self.requests: list[str] = []
        self.port = 0

    def put(self, path: str, item: Json) -> None:
        """New, or instead of the one with the same name."""
        with self._changed:
            name = item["metadata"]["name"]
            kind = "MODIFIED" if name in self._objects.get(path, {}) else "ADDED"
            self._note(kind, path, item)
            self._objects.setdefault(path, {})[name] = self._events[-1][3]

    def delete(self, path: str, name: str) -> None:
        with self._changed:
            self._note("DELETED", path, self._objects[path].pop(name))

    def forget(self) -> None:
        """Nobody can resume from before this moment."""
        with self._changed:
            self._version += 1
            self._oldest = self._version

    def cut_watches(self) -> None:
        with self._changed:
            self._cut += 1
            self._changed.notify_all()

    def _note(self, kind: str, path: str, item: Json) -> None:
        self._version += 1
        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self._version)}}
        self._events.append((self._version, kind, path, item))
        self._changed.notify_all()

    def listed(self, path: str, selector: str, limit: int, begin: int) -> Json:
        """At most ``limit`` of them, from the number ``begin`` on."""
        with self._changed:
            items = [item for item in self._objects.get(path, {}).values() if _matches(item, selector)]
            metadata = {"resourceVersion": str(self._version)}
            if begin + limit < len(items):
                metadata["continue"] = str(begin + limit)
            return {"kind": "List", "metadata": metadata, "items": items[begin : begin + limit]}

    def watched(self, path: str, selector: str, since: int) -> Iterator[Json]:
        """Events after that version, as they come, until the watches are cut off."""
        cut = self._cut
        if since < self._oldest:
            yield {"type": "ERROR", "object": GONE}
            return
        while True:
            with self._changed:
                while self._cut == cut and self._version <= since:
                    self._changed.wait()
                news = [event for event in self._events if event[0] > since]
                is_cut, since = self._cut != cut, self._version
            for _, kind, where, item in news:
                if where == path and _matches(item, selector):
                    yield {"type": kind, "object": item}
            if is_cut:
                return


def _matches(item: Json, selector: str) -> bool:
    labels = item["metadata"].get("labels", {})
    wanted = (part.partition("=") for part in selector.split(",") if part)
    return all(labels.get(key) == value for key, _, value in wanted)


@contextmanager
def serve_api(host: str = "127.0.0.1", before: ApiServer | None = None) -> Iterator[ApiServer]:
    """For the time of the context, at ``server.port``. ``before``: one that was served already, at its port again."""
    api = before or ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if api.is_away:
                self.close_connection = True
                return
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            selector = query.get("labelSelector", "")
            api.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            if query.get("watch") != "true":
                limit, begin = int(query.get("limit", 1_000_000)), int(query.get("continue", 0))
                listed = json.dumps(api.listed(url.path, selector, limit, begin)).encode()
                body = b"<html>Please log in.</html>" if api.is_garbled else listed
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for event in api.watched(url.path, selector, int(query["resourceVersion"])):
                    line = json.dumps(event).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.write(b"0\r\n\r\n")
            except BrokenPipeError:
                pass  # The watcher is gone, which is its right.

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, api.port), Handler)
    server.daemon_threads = True
    api.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    api.is_away = False
    try:
        yield api
    finally:
        api.is_away = True
        api.cut_watches()
        server.shutdown()
        server.server_close()
        thread.join()
