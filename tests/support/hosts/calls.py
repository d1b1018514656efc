"""Functions on the hosts of a bed without Ray: the same seam (cluster.control.host_calls), and a process in a namespace
for each call."""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.control.host_calls import HostAnswer, HostCall
from cluster.control.placement import HostInfo
from tests.support.hosts.host import Host

ROOT = Path(__file__).parents[3]
_RUN = """
import sys
from cluster.control.host_calls import run_named
sys.stdout.buffer.write(run_named(sys.argv[1], sys.stdin.buffer.read()))
"""


class NamespaceCalls:
    """``slots``: CPU ranks of each host. ``own``: the one that this process runs in; None: it is outside."""

    def __init__(self, hosts: Sequence[Host], slots: int, own: Host | None = None) -> None:
        self._hosts = {host.address: host for host in hosts}
        self._slots = slots
        self._own = own

    @property
    def host(self) -> str:
        return "outside" if self._own is None else self._own.address

    def nodes(self) -> list[HostInfo]:
        return [HostInfo(host.name, host.address, self._slots) for host in self._hosts.values()]

    def call(self, calls: Sequence[HostCall], timeout_s: float) -> list[HostAnswer]:
        with ThreadPoolExecutor(len(calls) or 1) as pool:
            return list(pool.map(lambda call: self._call(call, timeout_s), calls))

    def _call(self, call: HostCall, timeout_s: float) -> HostAnswer:
        command = [*self._hosts[call.host.address].prefix, sys.executable, "-c", _RUN, call.function]
        try:
            done = subprocess.run(
                command, input=call.argument, capture_output=True, timeout=timeout_s, cwd=ROOT, check=False
            )
        except subprocess.TimeoutExpired:
            return HostAnswer(error=f"did not answer within {timeout_s:.0f} s")
        if done.returncode != 0:
            return HostAnswer(error=done.stderr.decode().strip().splitlines()[-1])
        return HostAnswer(done.stdout)
