"""Leaders and front ends as processes of their own, over a copy of remuda-tiny: to be killed."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.served import REMUDA, free_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0


@dataclass
class FrontEndProcess:
    process: "subprocess.Popen[bytes]"
    port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def target(self) -> str:
        """Of its gRPC API."""
        return f"127.0.0.1:{self.grpc_port}"


@dataclass
class Cluster:
    """Leaders r0, r1, … and front ends, all attached to all leaders. ``addresses``: the leaders', as --leaders takes
    them."""

    leaders: list["subprocess.Popen[str]"]
    front_ends: list[FrontEndProcess]
    addresses: str
    directory: Path


@contextmanager
def cluster_of(num_leaders: int, num_front_ends: int, directory: Path) -> Iterator[Cluster]:
    copy_model(directory / "model")
    with ExitStack() as stack:
        leaders = [_leader(stack, f"r{index}", directory) for index in range(num_leaders)]
        addresses = []
        for leader in leaders:
            assert leader.stdout is not None
            addresses.append(leader.stdout.readline().strip())
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses), addresses
        named = ",".join(f"r{index}={address}" for index, address in enumerate(addresses))
        front_ends = [front_end(stack, named, directory / f"front-end-{i}.log") for i in range(num_front_ends)]
        for each in front_ends:
            wait_ready(each, num_leaders)
        yield Cluster(leaders, front_ends, named, directory)


def copy_model(directory: Path) -> None:
    """remuda-tiny with a chat template that has a place for tools; what was recorded of the original stays there."""
    original = ROOT / "engine" / "assets" / "remuda-tiny"
    shutil.copytree(original, directory, ignore=shutil.ignore_patterns("remuda-golden.json"))
    file = directory / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values["chat_template"] = (ROOT / "tests" / "data" / "templates" / "qwen3.jinja").read_text()
    file.write_text(json.dumps(values))


def _leader(stack: ExitStack, name: str, directory: Path) -> "subprocess.Popen[str]":
    log = stack.enter_context((directory / f"{name}.log").open("w"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.failover.leader_process", name, str(directory / "model")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    stack.callback(_end, process)
    return process


def front_end(stack: ExitStack, leaders: str, log: Path, *options: str) -> FrontEndProcess:
    """One more. The model is beside its log."""
    port, grpc_port = free_port(), free_port()
    command = [REMUDA, "frontend", str(log.parent / "model"), "--leaders", leaders, "--port", str(port), *options]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--grpc-port", str(grpc_port), "--served-model-name", "m"], cwd=ROOT, stdout=sink, stderr=sink
        )
    stack.callback(_end, process)
    return FrontEndProcess(process, port, grpc_port)


def wait_ready(front_end: FrontEndProcess, num_leaders: int) -> None:
    """It has joined all of them."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert front_end.process.poll() is None, "the front end ended"
        try:
            found = httpx.get(f"{front_end.url}/livez", timeout=2).json()
        except httpx.TransportError:
            found = {}
        if len(found.get("replicas", ())) == num_leaders:
            return
        time.sleep(0.05)
    raise AssertionError("not ready in time")


def _end(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()
