"""What is struck: a served cluster on this host, or one over hosts of a bed. Both look the same to a cell."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from tests.chaos.clients import GRPC
from tests.failover.processes import copy_model
from tests.support.served import Served, leader_of, processes_with

SETTLE_TIMEOUT_S = 60.0
POLL_S = 0.05


class NotSettled(AssertionError):
    """The cluster did not serve again in time."""


class Site(Protocol):
    """A served cluster.

    ``whole``: the process of each rank and of the leader when it was last seen whole (``settle``). Asking for them
    takes a process of its own, which is too long for the moment of a fault.
    """

    whole: dict[str, int]

    @property
    def urls(self) -> list[str]:
        """Its front ends, as clients reach them."""

    @property
    def network(self) -> Path | None:
        """The network namespace of its clients; None: this process's."""

    @property
    def log(self) -> str:
        """What the server has printed."""

    @property
    def exit_status(self) -> int | None:
        """None while the server runs."""

    def status(self) -> dict[str, Any]:
        """The replica, as ``remuda status --json`` has it."""

    def processes(self) -> list[psutil.Process]: ...

    def num_live(self) -> int:
        """Requests that the front end has taken and not ended."""


@dataclass
class OneHost:
    """A ``remuda serve`` of this machine. ``speaks_grpc``: its clients ask over remuda.v1, not HTTP."""

    served: Served
    speaks_grpc: bool = False
    whole: dict[str, int] = field(default_factory=dict)

    @property
    def network(self) -> None:
        return None

    @property
    def urls(self) -> list[str]:
        return [GRPC + self.served.target if self.speaks_grpc else self.served.url]

    @property
    def log(self) -> str:
        return self.served.log.read_text()

    @property
    def exit_status(self) -> int | None:
        assert self.served.process is not None
        return self.served.process.poll()

    def status(self) -> dict[str, Any]:
        replica: dict[str, Any] = self.served.status()["replicas"][0]
        return replica

    def processes(self) -> list[psutil.Process]:
        return processes_with(self.served.mark)

    def num_live(self) -> int:
        return live_requests(self.served.url)


def metric(url: str, name: str) -> int:
    """The sum of a metric's samples, by the front end's /metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")))


def live_requests(url: str) -> int:
    """Requests that the front end has taken and not ended."""
    return metric(url, "remuda_live_requests")


def settle(site: Site) -> dict[str, int]:
    """Wait until all ranks are ready and nothing runs. Returns their and the leader's processes. Raises NotSettled."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    reason = ""
    while time.monotonic() < deadline_s:
        if site.exit_status is not None:
            raise NotSettled(f"the server ended with status {site.exit_status}\n{site.log}")
        try:
            replica = site.status()
            processes = site.processes()
            found = {f"rank {rank['rank']}": int(rank["pid"]) for rank in replica["ranks"]}
            found["leader"] = leader_of(processes).pid
            alive = {process.pid for process in processes}
            if replica["state"] == "ready" and not replica["num_running"] and set(found.values()) <= alive:
                site.whole = found
                return found
            reason = f"{replica['state']}, {replica['num_running']} running, {found}"
        except (AssertionError, ValueError) as error:
            reason = str(error)
        time.sleep(POLL_S)
    raise NotSettled(f"not settled within {SETTLE_TIMEOUT_S:g} s: {reason}\n{site.log}")


def gang_of(processes: list[psutil.Process]) -> dict[int, str]:
    """Process → ``a rank`` or ``leader``, of those that have begun to be one. Ray names a process after its call."""
    titles = {"remuda: rank": "a rank", "ray::Rank": "a rank", "remuda: leader": "leader", "ray::Leader": "leader"}
    found: dict[int, str] = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline()[:1])
            for title, kind in titles.items():
                if name.startswith(title):
                    found[process.pid] = kind
    return found


def replaced_since(before: dict[int, str], whole: dict[str, int]) -> tuple[str, ...]:
    """Kinds of ``gang_of`` of which a process is not in the whole cluster (``settle``) any more."""
    return tuple(sorted({kind for pid, kind in before.items() if pid not in whole.values()}))


@contextlib.contextmanager
def one_host(
    directory: Path, *options: str, temporary: Path = Path("/tmp"), speaks_grpc: bool = False
) -> Iterator[OneHost]:
    directory.mkdir(parents=True, exist_ok=True)
    model = directory / "model"
    copy_model(model)
    arguments = (str(model), "--served-model-name", "m", "--dtype", "float32", *options)
    with Served(arguments, directory / "serve.log", temporary) as served:
        yield OneHost(served, speaks_grpc)
