"""Clients that run all at once, note when each token came, and go on at another front end where they are given one."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.failover import grpc_streams
from tests.failover.streams import ChoiceText, Reading, read

TIMEOUT_S = 100.0
COME_BACK_INTERVAL_S = 0.2
GRPC = "grpc://"
"""Before the address of a front end that is asked over remuda.v1: always for a stream, and over one connection."""
_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


def enter_network(network: Path) -> None:
    """The calling thread's sockets are the network namespace's from now on. Raises OSError."""
    descriptor = os.open(network, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {network}")
    finally:
        os.close(descriptor)


def in_network(network: Path | None, call: Callable[[], T]) -> T:
    """What the call gives when it is made from the namespace."""
    with ThreadPoolExecutor(1) as pool:
        if network is not None:
            pool.submit(enter_network, network).result()
        return pool.submit(call).result()


class Client(threading.Thread):
    """One request, over as many connections as it takes. ``urls``: front ends; one alone is asked once and its stream
    is not resumable. ``network``: the namespace to ask from."""

    def __init__(self, name: str, body: dict[str, Any], urls: Sequence[str], network: Path | None) -> None:
        super().__init__(name=name, daemon=True)
        self.body = body
        self.reading = Reading()
        self.times_s: list[float] = []
        """When something of the answer came; the first is when it was asked for."""
        self.failure: Exception | None = None
        self.num_connections = 0
        self._num_events = 0
        self._urls = urls
        self._network = network

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream", True)) or self._urls[0].startswith(GRPC)

    def run(self) -> None:
        try:
            if self._network is not None:
                enter_network(self._network)
            self.times_s.append(time.monotonic())
            if self.is_streamed:
                self._read_stream()
            else:
                self.reading = whole_answer(self._urls[-1], self.body)
        except Exception as error:  # whatever it was, the table says that the request was lost
            self.failure = error

    def _read_stream(self) -> None:
        if self._urls[0].startswith(GRPC):
            self.num_connections += 1
            grpc_streams.read(self._urls[0].removeprefix(GRPC), self.body, self.reading, self._note)
            return
        deadline_s = self.times_s[0] + TIMEOUT_S
        while not self.reading.is_done and time.monotonic() < deadline_s:
            url = self._urls[self.num_connections % len(self._urls)]
            self.num_connections += 1
            read(url, self.body, self.reading, self._note, resumable=len(self._urls) > 1)
            if len(self._urls) == 1:
                return
            if not self.reading.is_done:
                time.sleep(COME_BACK_INTERVAL_S)

    def _note(self, reading: Reading) -> None:
        if reading.num_events > self._num_events:  # anything else only keeps the connection alive
            self._num_events = reading.num_events
            self.times_s.append(time.monotonic())

    def gap_s(self, since_s: float) -> float:
        """The longest pause that ended after ``since_s``."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((later - sooner for sooner, later in pairs if later > since_s), default=0.0)


def whole_answer(url: str, body: dict[str, Any]) -> Reading:
    """Of a request without a stream."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = httpx.post(url + path, json={"model": "m", "return_token_ids": True, **body}, timeout=TIMEOUT_S)
    found = Reading(is_done=True)
    values = answer.json()
    if answer.status_code != httpx.codes.OK:
        found.errors.append(values["error"])
        return found
    found.usage.append(values["usage"])
    for choice in values["choices"]:
        message = choice.get("message", choice)
        calls = {
            index: [call["function"]["name"], call["function"]["arguments"]]
            for index, call in enumerate(message.get("tool_calls") or ())
        }
        found.choices[choice["index"]] = ChoiceText(
            text=message.get("content") or message.get("text") or "",
            token_ids=choice.get("token_ids") or [],
            logprobs=logprobs_of(choice),
            tool_calls=calls,
            finish_reason=choice["finish_reason"],
        )
    return found


def logprobs_of(choice: dict[str, Any]) -> list[Any]:
    logprobs = choice.get("logprobs")
    return logprobs["content"] if logprobs and "content" in logprobs else []


def run_all(
    bodies: dict[str, dict[str, Any]],
    urls: Sequence[str],
    network: Path | None = None,
    strike: Callable[[list[Client]], None] = lambda clients: None,
) -> list[Client]:
    """All at once; ``strike`` is called as soon as they have begun. Returns when each has its answer or has failed."""
    clients = [Client(name, body, urls, network) for name, body in bodies.items()]
    for client in clients:
        client.start()
    try:
        strike(clients)
    finally:
        deadline_s = time.monotonic() + TIMEOUT_S
        for client in clients:
            client.join(max(0.0, deadline_s - time.monotonic()))
    return clients
