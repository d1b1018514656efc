"""A host's membership in a group: joining it, and seeing that it is over."""

import time
from collections.abc import Callable
from threading import Event

from cluster.control.group_host import GroupHost, group_token
from cluster.control.ray_node import RayNode
from cluster.control.ray_runtime import check_listener, is_member, refresh_ray
from cluster.control.ray_settings import parse_address
from cluster.errors import StartFailed

RETRY_INTERVAL_S = 1.0
WATCH_INTERVAL_S = 5.0
HEAD_GONE_S = 60.0
"""Without an answer of the head's for so long a host leaves, to join again from the beginning."""
STUCK_S = 2 * HEAD_GONE_S
"""A member that has not looked after its head for so long hangs."""


class Membership:
    """What probes are told. Written by the thread that ``stay`` runs in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_s: float | None = None
        """When a member last looked whether it still is one."""

    def looked(self) -> None:
        self._looked_s = self._clock()

    def ended(self) -> None:
        self._looked_s = None

    def live(self) -> tuple[bool, dict[str, str]]:
        looked_s = self._looked_s
        if looked_s is None or self._clock() - looked_s <= STUCK_S:
            return True, {}
        return False, {"group": f"not looked after for {self._clock() - looked_s:.0f} s"}

    def ready(self) -> tuple[bool, str]:
        is_member = self._looked_s is not None
        return is_member, "a member of its group" if is_member else "not a member of its group yet"


def stay(host: GroupHost, head_address: str, stop: Event, tell: Callable[[str], None], membership: Membership) -> None:
    """Join the group when its head answers, and stay until ``stop`` is set.

    Args:
        membership: told of every look.
        tell: what happened, for whoever started this.

    Raises:
        StartFailed: this host is no member any more; start anew.
    """
    name, port = parse_address(head_address)
    with group_token(host) as token:
        refresh_ray()
        _await_head(name, port, stop, tell)
        if stop.is_set():
            return
        with RayNode.start(host.spec(head_address), token_file=token):
            tell(f"{host.node_ip} has joined the group of {head_address}")
            membership.looked()
            try:
                _watch(host, head_address, stop, membership)
            finally:
                membership.ended()


def _await_head(name: str, port: int, stop: Event, tell: Callable[[str], None]) -> None:
    is_told = False
    while not stop.is_set():
        try:
            check_listener(name, port)
        except StartFailed:
            if not is_told:
                tell(f"waiting for the group's head at {name}:{port}")
                is_told = True
            stop.wait(RETRY_INTERVAL_S)
        else:
            return


def _watch(host: GroupHost, head_address: str, stop: Event, membership: Membership) -> None:
    """Ray itself would wait for its head for days, which ranks that go on by themselves need, and would never join a
    new one."""
    heard_s = time.monotonic()
    while not stop.wait(WATCH_INTERVAL_S):
        try:
            member = is_member(head_address, host.node_ip)
        except StartFailed:
            if time.monotonic() > heard_s + HEAD_GONE_S:
                raise
            membership.looked()
            continue
        membership.looked()
        heard_s = time.monotonic()
        if not member:
            raise StartFailed(f"{host.node_ip} is no member of the group of {head_address} any more; start it anew")
