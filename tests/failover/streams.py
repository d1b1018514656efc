"""What a client gets of a stream over plain HTTP, event by event, and what it adds up to."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class ChoiceText:
    """All that came of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    tool_calls: dict[int, list[str]] = field(default_factory=dict)
    """By number: name and arguments."""
    finish_reason: str | None = None
    roles: int = 0


@dataclass
class Reading:
    """A stream as far as it was read, over however many connections."""

    choices: dict[int, ChoiceText] = field(default_factory=dict)
    usage: list[Any] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    last_event_id: str | None = None
    call_id: str = ""
    num_events: int = 0
    is_done: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def take(self, lines: list[str]) -> None:
        """One event's lines. Its id counts only when the event is complete."""
        fields = [line.partition(": ")[::2] for line in lines if not line.startswith(":")]
        values = dict(fields)
        if "data" not in values:
            return
        self.num_events += 1
        self.last_event_id = values.get("id", self.last_event_id)
        if values["data"] == "[DONE]":
            self.is_done = True
            return
        chunk = json.loads(values["data"])
        if "error" in chunk:
            self.errors.append(chunk["error"])
            return
        assert self.call_id in ("", chunk["id"])
        self.call_id = chunk["id"]
        if chunk.get("usage"):
            self.usage.append(chunk["usage"])
        for choice in chunk["choices"]:
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        found = self.choices.setdefault(choice["index"], ChoiceText())
        assert found.finish_reason is None, "something came after the end of a choice"
        delta = choice.get("delta", choice)
        found.roles += "role" in delta
        found.text += delta.get("content") or delta.get("text") or ""
        found.token_ids += choice.get("token_ids") or []
        if logprobs := choice.get("logprobs"):
            found.logprobs += (
                logprobs["content"]
                if "content" in logprobs
                else list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["text_offset"], strict=True))
            )
        for call in delta.get("tool_calls") or ():
            if "name" in call["function"]:
                assert call["index"] not in found.tool_calls, "a call began twice"
                found.tool_calls[call["index"]] = [call["function"]["name"], ""]
            found.tool_calls[call["index"]][1] += call["function"]["arguments"]
        found.finish_reason = choice["finish_reason"]


def read(
    url: str,
    body: dict[str, Any],
    reading: Reading | None = None,
    on_event: Callable[[Reading], object] = lambda reading: None,
    resumable: bool = True,
) -> Reading:
    """Read to the end, or until the connection breaks or ``on_event`` says False; a reading that has begun is gone on
    with."""
    found = Reading() if reading is None else reading
    headers = {"remuda-resumable": "1"} if resumable else {}
    if found.last_event_id is not None:
        headers["last-event-id"] = found.last_event_id
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    everything = {"model": "m", "stream": True, "return_token_ids": True, **body}
    everything["stream_options"] = {"include_usage": True}
    try:
        with httpx.stream("POST", url + path, json=everything, headers=headers, timeout=60) as response:
            assert response.status_code == httpx.codes.OK, response.read()
            lines: list[str] = []
            for line in response.iter_lines():
                if line:
                    lines.append(line)
                    continue
                found.take(lines)
                lines = []
                if on_event(found) is False:
                    break
    except httpx.TransportError:
        pass  # the rest is read over another connection
    return found
