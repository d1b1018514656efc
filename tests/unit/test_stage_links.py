"""Hidden states between the real ranks of neighbouring stages: every byte, bounded buffers, and a peer that is gone."""

import os
import time

import numpy as np
import pytest
import torch

from engine.config import ParallelConfig
from engine.errors import ProtocolViolation, RankFailure
from engine.parallel.distributed import init_distributed
from engine.parallel.mesh import Mesh
from engine.parallel.shared_link import SharedMemoryLink
from engine.parallel.stage_link import SlicedReceiver, SlicedSender
from engine.parallel.tcp_link import TcpReceiver, TcpSender
from tests.support.rank_pool import RankContext, run_ranks

pytestmark = pytest.mark.timeout(90)
HOSTS = pytest.mark.parametrize("num_hosts", [1, 2], ids=["shared-memory", "tcp"])


def joined(context: RankContext, num_hosts: int, tp: int = 1, timeout_s: float = 20.0) -> Mesh:
    """Two stages. Stages of several hosts have different loopback addresses, and share no memory."""
    address = f"127.0.0.{1 + context.rank // tp * (num_hosts - 1)}"
    parallel = ParallelConfig(pp=2, tp=tp)
    mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), timeout_s, address)
    link = mesh.next if mesh.is_first_stage else mesh.previous
    if num_hosts == 1:
        assert isinstance(link, SharedMemoryLink)
    elif tp == 1:
        assert isinstance(link, TcpSender | TcpReceiver)
    else:
        assert isinstance(link, SlicedSender | SlicedReceiver)
    return mesh


def message(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    # Some are of several of a link's slots, and some have an odd number of columns.
    num_tokens = int(10 ** (torch.rand(1, generator=generator).item() * 3.7))
    dtype = (torch.float32, torch.bfloat16)[number % 2]
    return torch.randn(num_tokens, 255 + number % 3, generator=generator).to(dtype)


def exchange(context: RankContext, num_hosts: int, tp: int) -> bool:
    mesh = joined(context, num_hosts, tp)
    pauses = np.random.default_rng(context.rank)
    for number in range(40):
        expected = message(number)
        if pauses.random() < 0.1:
            time.sleep(0.01)
        if mesh.next is not None:
            sent = expected.clone()
            mesh.next.send(sent)
            sent.zero_()  # the link must have taken it over
        else:
            assert mesh.previous is not None
            found = mesh.previous.receive((expected.shape[0], expected.shape[1]), expected.dtype)
            assert torch.equal(found, expected), number
    if mesh.next is not None and num_hosts > 1:
        context.store.wait([f"done-{mesh.tp_rank}"])  # the connection ends with the process
    context.store.set(f"done-{mesh.tp_rank}", "")
    return True


@HOSTS
@pytest.mark.parametrize("tp", [1, 2])
def test_every_message_arrives_whole_and_in_order(num_hosts: int, tp: int) -> None:
    assert run_ranks(exchange, 2 * tp, num_hosts, tp) == [True] * 2 * tp


def send_ahead(context: RankContext, num_hosts: int) -> str:
    """The receiver takes nothing at first; the sender counts how far it gets."""
    mesh = joined(context, num_hosts, timeout_s=1.0)
    if mesh.next is None:
        context.store.get("full")
        return ""
    num_sent = 0
    try:
        while num_sent < 1000:
            mesh.next.send(torch.zeros(1024, 1024))
            num_sent += 1
    except RankFailure as error:
        return f"{'many' if num_sent >= 8 else 'few'}: {error}"
    finally:
        context.store.set("full", "")
    return "without bounds"


@HOSTS
def test_a_sender_runs_ahead_so_far_and_no_further(num_hosts: int) -> None:
    sender, _ = run_ranks(send_ahead, 2, num_hosts)
    assert sender == "many: rank 1 of the neighbouring stage took nothing for 1 s"


def receive_from_nobody(context: RankContext, num_hosts: int, leave: str) -> tuple[float, str]:
    mesh = joined(context, num_hosts, timeout_s=1.5)
    if mesh.next is not None:
        mesh.next.send(torch.ones(1, 4))
        context.store.get("received")
        if leave == "die":
            os._exit(1)
        context.store.get("given up")
        return 0.0, ""
    assert mesh.previous is not None
    mesh.previous.receive((1, 4), torch.float32)
    context.store.set("received", "")
    began = time.monotonic()
    try:
        mesh.previous.receive((1, 4), torch.float32)
    except RankFailure as error:
        return time.monotonic() - began, str(error)
    finally:
        context.store.set("given up", "")
    raise AssertionError("nobody sent anything")


@HOSTS
def test_a_silent_peer_is_named_after_the_timeout(num_hosts: int) -> None:
    _, (waited_s, words) = run_ranks(receive_from_nobody, 2, num_hosts, "hang")
    assert 1.0 < waited_s < 10.0
    assert words == "rank 0 of the neighbouring stage sent nothing for 1.5 s"


@HOSTS
def test_a_dead_peer_is_named_at_once(num_hosts: int) -> None:
    _, (waited_s, words) = run_ranks(receive_from_nobody, 2, num_hosts, "die", allow_errors=True)
    assert waited_s < 1.4
    assert "rank 0 of the neighbouring stage" in words and ("has died" in words or "was lost" in words)


def disagree(context: RankContext, num_hosts: int) -> str:
    mesh = joined(context, num_hosts)
    if mesh.next is not None:
        mesh.next.send(torch.ones(3, 4))
        context.store.get("seen")
        return ""
    assert mesh.previous is not None
    try:
        mesh.previous.receive((2, 4), torch.float32)
    except ProtocolViolation as error:
        return str(error)
    finally:
        context.store.set("seen", "")
    return "taken for what was due"


@HOSTS
def test_hidden_states_of_another_size_are_refused(num_hosts: int) -> None:
    assert run_ranks(disagree, 2, num_hosts)[1].startswith("rank 0 sent ")
