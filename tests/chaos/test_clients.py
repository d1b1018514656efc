"""How the pauses of a stream are measured."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.chaos.clients import Client

PAUSE_S = 0.6


class _Stream(BaseHTTPRequestHandler):
    """Three events, with a pause before the second in which only comments come."""

    released = threading.Event()

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self._event({"choices": [{"index": 0, "text": "a", "finish_reason": None}], "id": "x"})
        for _ in range(3):
            self.released.wait(PAUSE_S / 3)  # the pause that is measured
            self._write(": keep-alive\n\n")
        self._event({"choices": [{"index": 0, "text": "b", "finish_reason": "stop"}], "id": "x"})
        self._write("data: [DONE]\n\n")

    def _event(self, chunk: dict[str, object]) -> None:
        self._write(f"data: {json.dumps(chunk)}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stream)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_only_keeps_a_connection_alive_ends_no_pause(url: str) -> None:
    client = Client("one", {"prompt": "x"}, [url], None)
    client.start()
    client.join(10)
    assert (client.reading.is_done, client.reading.choices[0].text, client.failure) == (True, "ab", None)
    assert client.gap_s(0.0) >= PAUSE_S * 0.9
