"""Running a function of ours on given hosts: the seam between what wants to know something of every host and Ray.

What crosses it are names and bytes that the two sides encode themselves.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.control.placement import HostInfo


@dataclass(frozen=True)
class HostCall:
    """``function``: ``package.module:name``, from bytes to bytes. ``on_gpu``: it gets a GPU of the host to itself."""

    host: HostInfo
    function: str
    argument: bytes
    on_gpu: bool = False


@dataclass(frozen=True)
class HostAnswer:
    """What the function returned; where it did not, ``error`` says why in one line."""

    value: bytes = b""
    error: str | None = None


class HostCalls(Protocol):
    """Hosts on which functions can be run."""

    @property
    def host(self) -> str:
        """The address of the host that this process runs on."""

    def nodes(self) -> list[HostInfo]:
        """The living hosts, this one first."""

    def call(self, calls: Sequence[HostCall], timeout_s: float) -> list[HostAnswer]:
        """Run all at the same time, each in a process of its own; answers in the same order.

        Whatever does not end in time is ended. Raises nothing for a call that fails: its answer says so.
        """


def run_named(function: str, argument: bytes) -> bytes:
    """On the host itself: import and call."""
    module, _, name = function.partition(":")
    answer: bytes = getattr(importlib.import_module(module), name)(argument)
    return answer
