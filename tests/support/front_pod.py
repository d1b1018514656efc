"""The chart's front-end pod, acted out on a host of its own, and clients that call it from another one."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chart.rendering import FULLNAME, Document, only
from tests.support.hosts.host import Host
from tests.support.kubelet import REMUDA, Kubelet

QUESTION = "My name is Zora. What is my name?"
ANSWER = "Your name is Zora."
MAX_ANSWER_S = 100.0
"""A front end's own bound for requests that wait for a replica is 90 s."""


@dataclass
class Call:
    """A client's request. ``body``: where the answer is written as it comes."""

    process: "subprocess.Popen[str]"
    body: Path

    def end(self) -> tuple[int, str, str]:
        """Status, Retry-After and body, when it is over."""
        printed, _ = self.process.communicate(timeout=MAX_ANSWER_S + 10)
        status, _, retry_after = printed.partition(" ")
        return int(status), retry_after, self.body.read_text()

    @property
    def num_events(self) -> int:
        """So far, of a stream."""
        return self.body.read_text().count("data:") if self.body.exists() else 0


class FrontPod:
    """``client``: the host that calls it."""

    def __init__(self, kubelet: Kubelet, documents: list[Document], host: Host, client: Host, directory: Path) -> None:
        self._kubelet = kubelet
        self._pod = only(documents, "Deployment", "frontend")["spec"]["template"]
        self._host = host
        self._client = client
        self._directory = directory
        self._num_calls = 0

    def start(self) -> None:
        self._kubelet.start(self._pod, self._host, "frontend", f"{FULLNAME}-frontend-0")

    def is_ready(self) -> bool:
        return self._kubelet.probe(self._pod, self._host, "frontend")

    @property
    def _key(self) -> Path:
        return self._directory / self._host.address / "etc" / "remuda" / "keys" / "api-keys"

    def replicas(self) -> dict[str, dict[str, Any]]:
        """As `remuda status` shows them, by id."""
        done = self._host.run([REMUDA, "status", "--json", "--api-key-file", str(self._key)], timeout_s=60)
        assert done.returncode == 0, f"{done.stderr}\n{self._kubelet.logs()}"
        return {replica["id"]: replica for replica in json.loads(done.stdout)["replicas"]}

    def call(self, **more: Any) -> Call:
        """The chat completion of a question."""
        self._num_calls += 1
        answer = self._directory / f"answer-{self._num_calls}"
        body = {"model": "remuda-tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **more}
        options = ["--silent", "--no-buffer", "--max-time", str(MAX_ANSWER_S), "--output", str(answer)]
        options += ["--header", f"Authorization: Bearer {self._key.read_text()}"]
        options += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
        options += ["--write-out", "%{http_code} %header{retry-after}"]
        url = f"http://{self._host.address}:8000/v1/chat/completions"
        return Call(self._client.popen(["curl", *options, url]), answer)

    def stream(self, num_tokens: int) -> Call:
        """It shares no cached prefix with another one, so that replicas with the least load get it."""
        salt = f"stream {self._num_calls}"
        return self.call(max_tokens=num_tokens, ignore_eos=True, stream=True, cache_salt=salt)

    def until_streaming(self, calls: Sequence[Call]) -> None:
        self._kubelet.until(lambda: all(call.num_events > 10 for call in calls))

    def check_answer(self) -> None:
        status, _, text = self.call(max_tokens=12).end()
        assert status == 200, f"{status} {text}\n{self._kubelet.logs()}"
        assert json.loads(text)["choices"][0]["message"]["content"] == ANSWER

    def check_refusal(self) -> None:
        """A client is told when to come back."""
        status, retry_after, text = self.call(max_tokens=12).end()
        assert (status, "no replica is ready" in text) == (503, True), text
        assert int(retry_after) > 0


def is_whole(body: str) -> bool:
    """Whether a stream came to its end."""
    return body.endswith("data: [DONE]\n\n")


def text_of(body: str) -> str:
    """What a stream said."""
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
