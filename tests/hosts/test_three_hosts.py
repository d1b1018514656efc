"""One gang over three hosts: a real Ray cluster over namespaces, ``remuda serve --address`` on one of them, four
tensor-parallel ranks on all three, and the same greedy tokens as transformers gives."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.control.ray_settings import authentication_environment
from cluster.replica.model_source import resolve
from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = pytest.mark.netns

REMUDA = str(Path(sys.executable).parent / "remuda")
QUESTION = "My name is Zora. What is my name?"
NUM_SLOTS = (1, 2, 1)
NUM_TOKENS = 12
READY_TIMEOUT_S = 120.0
HTTP = """
import httpx, json, sys
body = json.loads(sys.argv[1])
answer = httpx.post("http://127.0.0.1:8000/v1/chat/completions", json=body, timeout=60)
answer.raise_for_status()
print(json.dumps(answer.json()))
"""


class ThreeHosts:
    """The bed, the host that serves, and how to run a command of ours there."""

    def __init__(self, made: Bed, host: Host, server: "subprocess.Popen[str]", log: Path) -> None:
        self.bed = made
        self.host = host
        self.server = server
        self.log = log

    def remuda(self, *arguments: str) -> dict[str, Any]:
        """The JSON that a command printed."""
        done = self.host.run([REMUDA, *arguments, "--json"], timeout_s=60)
        assert done.returncode == 0, f"{done.stderr}\n{self.log.read_text()}"
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def wait_ready(self) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "ready in" not in self.log.read_text():
            assert self.server.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def three_hosts(tmp_path_factory: pytest.TempPathFactory, make_bed: MakeBed) -> Iterator[ThreeHosts]:
    log = tmp_path_factory.mktemp("three-hosts") / "serve.log"
    made = make_bed(3)
    with log.open("w") as output:
        nodes = made.start_ray(cpu_slots=NUM_SLOTS)
        # Not the head: any host of the cluster may serve.
        host = made.hosts[1]
        command = [REMUDA, "serve", "remuda-tiny", "--tp", "4", "--tp-across-hosts", "--ep", "2", "--dtype", "float32"]
        server = host.popen(
            [*command, "--address", nodes[0].address],
            env={**os.environ, **authentication_environment(nodes[0].token_file)},
            stdout=output.fileno(),
            stderr=output.fileno(),
        )
        served = ThreeHosts(made, host, server, log)
        served.wait_ready()
        yield served
        server.terminate()
        assert server.wait(60) == 0, log.read_text()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """transformers' greedy answer, float32, one process."""
    directory = resolve("remuda-tiny", None).directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
    token_ids: list[int] = output[0, prompt["input_ids"].shape[1] :].tolist()
    return token_ids


@pytest.mark.timeout(240)
def test_ranks_are_on_all_three_hosts(three_hosts: ThreeHosts) -> None:
    (replica,) = three_hosts.remuda("status")["replicas"]
    addresses = [rank["host"].rpartition("(")[2].rstrip(")") for rank in replica["ranks"]]
    assert sorted(addresses) == sorted(
        host.address for host, slots in zip(three_hosts.bed.hosts, NUM_SLOTS, strict=True) for _ in range(slots)
    )
    for host in three_hosts.bed.hosts:
        ranks = [rank for rank, address in zip(replica["ranks"], addresses, strict=True) if address == host.address]
        assert {rank["pid"] for rank in ranks} <= set(host.pids())


def test_the_answer_over_grpc_is_that_of_transformers(three_hosts: ThreeHosts, expected: list[int]) -> None:
    answer = three_hosts.remuda("chat", QUESTION, "--temperature", "0", "--max-tokens", str(NUM_TOKENS))
    assert answer["token_ids"] == expected


def test_the_answer_over_http_names_her(three_hosts: ThreeHosts) -> None:
    body = {"model": "remuda-tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    done = three_hosts.host.run([sys.executable, "-c", HTTP, json.dumps(body)], timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert "Zora" in json.loads(done.stdout)["choices"][0]["message"]["content"]
