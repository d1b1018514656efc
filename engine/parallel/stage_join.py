"""Connects a rank with its counterparts in the stages before and after its own."""

import torch
import torch.distributed as dist

from engine.parallel.formation_end import FormationEnd
from engine.parallel.memory_area import all_of
from engine.parallel.mesh import Mesh
from engine.parallel.nccl import NcclLink
from engine.parallel.shared_link import SharedMemoryLink
from engine.parallel.stage_link import SlicedReceiver, SlicedSender, StageReceiver, StageSender
from engine.parallel.tcp_link import TcpReceiver, TcpSender
from engine.progress import Axis

_Link = SharedMemoryLink | NcclLink | TcpSender | TcpReceiver


def join_stages(
    mesh: Mesh, store: dist.Store, device: torch.device, timeout_s: float, address: str, end: FormationEnd
) -> tuple[StageReceiver | None, StageSender | None]:
    """``mesh`` has its ``tp`` already. ``address``: of this host, as other hosts reach it. ``timeout_s``: of the first
    link. The n-th waits n times as long, for all stages before it to compute. ``end`` is told of the links.

    Ranks meet their predecessors first, so the stages connect one after the other. Raises RuntimeError where they do
    not meet in time.
    """
    previous: StageReceiver | None = None
    following: StageSender | None = None
    stride = mesh.config.dp * mesh.config.tp
    if not mesh.is_first_stage:
        timeout = timeout_s * mesh.pp_rank
        link, is_sliced = _join(mesh, store, mesh.rank - stride, mesh.rank, device, timeout, address)
        assert not isinstance(link, TcpSender)
        end.add(link)
        previous = SlicedReceiver(link, mesh.tp) if is_sliced else link
    if not mesh.is_last_stage:
        timeout = timeout_s * (mesh.pp_rank + 1)
        link, is_sliced = _join(mesh, store, mesh.rank, mesh.rank + stride, device, timeout, address)
        assert not isinstance(link, TcpReceiver)
        end.add(link)
        following = SlicedSender(link, mesh.tp) if is_sliced else link
    return previous, following


def _join(
    mesh: Mesh, store: dist.Store, sender: int, receiver: int, device: torch.device, timeout_s: float, address: str
) -> tuple[_Link, bool]:
    """The link between two ranks, and whether hidden states cross it in parts: where any of the tp ranks' links goes to
    another host, all of them must."""
    rank, peer = (0, receiver) if mesh.rank == sender else (1, sender)
    tp_rank = mesh.tp_rank
    marks = mesh.progress.axis(Axis.NEXT if mesh.rank == sender else Axis.PREVIOUS)
    store = dist.PrefixStore(f"stages-{sender - tp_rank}-{receiver - tp_rank}", store)
    pair = dist.PrefixStore(f"pair-{tp_rank}", store)
    link: _Link | None
    if device.type == "cuda":
        pair.set(f"host/{rank}", address)
        is_on_one_host = len(set(all_of(pair, "host", 2, timeout_s))) == 1
        link = NcclLink(pair, rank, peer, device, timeout_s, marks)
    else:
        link = SharedMemoryLink.join(pair, rank, peer, address, timeout_s, marks)
        is_on_one_host = link is not None
        if link is None and rank == 0:
            link = TcpSender.connect(pair, peer, timeout_s, marks)
        elif link is None:
            link = TcpReceiver.accept(pair, address, peer, timeout_s, marks)
    assert link is not None
    store.set(f"is-on-one-host/{tp_rank}", "yes" if is_on_one_host else "no")
    crosses_hosts = "no" in all_of(store, "is-on-one-host", mesh.config.tp, timeout_s)
    return link, crosses_hosts and mesh.config.tp > 1
