"""How the pauses of a stream are measured."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.chaos.clients import GRPC, Client
from tests.chaos.mix import short_prompts
from tests.failover.grpc_streams import request_of
from tests.failover.streams import Reading
from tests.frontend.scripted import says
from tests.frontend.servers import served

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


async def test_a_client_gets_the_same_over_grpc() -> None:
    body = {"prompt": "x", "n": 2, "max_tokens": 9, "logprobs": 2, "temperature": 0, "ignore_eos": True}
    found: list[Reading] = []
    async with served(says([300, 301, 302])) as one:
        for url in (one.url, f"{GRPC}127.0.0.1:{one.front_end.grpc_port}"):
            client = Client("one", {**body, "stream": True}, [url], None)
            client.start()
            await asyncio.to_thread(client.join, 30)
            assert (client.failure, client.reading.errors, client.reading.is_done) == (None, [], True)
            assert len(client.times_s) > 2
            found.append(client.reading)
    assert [choice.text for choice in found[0].choices.values()] == [c.text for c in found[1].choices.values()]
    assert [c.token_ids for c in found[0].choices.values()] == [c.token_ids for c in found[1].choices.values()]
    assert found[0].num_tokens == found[1].num_tokens == 6
    assert found[0].usage[0]["completion_tokens"] == found[1].usage[0]["completion_tokens"]


def test_every_kind_of_request_has_a_form_in_grpc() -> None:
    forms = {name: request_of(body).sampling for name, body in short_prompts().items()}
    assert all(form.max_tokens == forms["greedy"].max_tokens for form in forms.values())
    assert [name for name, form in forms.items() if form.HasField("grammar")] == ["grammar", "tools", "tools, at once"]
    assert forms["seeded, penalties"].presence_penalty and forms["logprobs, echo"].logprobs and forms["tools"].logprobs
