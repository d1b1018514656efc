"""Lets every host measure itself, and holds its clock against ours."""

import time
from collections.abc import Sequence

import msgspec

from cluster.config import is_loopback
from cluster.control.host_calls import HostAnswer, HostCall, HostCalls
from cluster.control.placement import HostInfo
from cluster.doctor.facts import Clock, HostFacts, HostQuestion
from cluster.doctor.finding import Finding, Level
from cluster.doctor.measure_host import measure_host, tell_time
from cluster.replica.model_source import ModelSource

HOST_TIMEOUT_S = 60.0
_CLOCK_TIMEOUT_S = 20.0
_CLOCK_TRIES = 3
_MEASURE = f"{measure_host.__module__}:{measure_host.__name__}"
_TELL_TIME = f"{tell_time.__module__}:{tell_time.__name__}"


def ask_hosts(
    calls: HostCalls, hosts: Sequence[HostInfo], *, model: str | None, revision: str | None, reads_disk: bool
) -> tuple[list[HostFacts], list[Finding]]:
    """What each host says of itself, and a failure for each that does not.

    A private Ray's only host is measured in this process, which is quicker. Any other is asked through its Ray, this
    one too: only there the settings are seen with which it was started.
    """
    num_bytes = 0 if model is None else ModelSource(model, revision).cached_bytes()
    questions = [
        msgspec.msgpack.encode(HostQuestion(host.address, model, revision, reads_disk, num_bytes)) for host in hosts
    ]
    remote = [
        HostCall(host, _MEASURE, question)
        for host, question in zip(hosts, questions, strict=True)
        if not is_loopback(host.address)
    ]
    answers = {
        call.host.address: answer for call, answer in zip(remote, calls.call(remote, HOST_TIMEOUT_S), strict=True)
    }
    facts, failures = [], []
    for host, question in zip(hosts, questions, strict=True):
        answer = answers.get(host.address) or _measure_here(question)
        if answer.error is not None:
            remedy = "install the same wheels as here, under the same path; see that the host is up (ray status)"
            failures.append(Finding("host", host.address, Level.FAIL, answer.error, "", remedy))
        else:
            facts.append(msgspec.msgpack.decode(answer.value, type=HostFacts))
    return facts, failures


def _measure_here(question: bytes) -> HostAnswer:
    """As a call of another host answers: what goes wrong is told, and the others are still measured."""
    try:
        return HostAnswer(measure_host(question))
    except OSError as error:
        return HostAnswer(error=str(error))


def ask_clocks(calls: HostCalls, hosts: Sequence[HostInfo]) -> dict[str, Clock]:
    """Of the hosts other than this one: one after another, the quickest answer of a few counts."""
    clocks = {}
    for host in hosts:
        if host.address == calls.host:
            continue
        found = [clock for _ in range(_CLOCK_TRIES) if (clock := _ask_clock(calls, host)) is not None]
        if found:
            clocks[host.address] = min(found, key=lambda clock: clock.uncertainty_s)
    return clocks


def _ask_clock(calls: HostCalls, host: HostInfo) -> Clock | None:
    asked_s = time.time()
    (answer,) = calls.call([HostCall(host, _TELL_TIME, b"")], _CLOCK_TIMEOUT_S)
    got_s = time.time()
    if answer.error is not None:
        return None
    told_s = msgspec.msgpack.decode(answer.value, type=float)
    return Clock(told_s - (asked_s + got_s) / 2, (got_s - asked_s) / 2)
