"""Collectives over torch.distributed process groups: gloo between CPU ranks of several hosts, NCCL between GPUs.

Groups are made directly from a store, without torch's global default group: after a fault a gang re-forms in the same
process with a fresh store and fresh groups, and several meshes may live side by side.
"""

import datetime
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from engine.config import ParallelConfig
from engine.errors import RankFailure
from engine.parallel.collectives import Collectives, LocalCollectives, ReceivedRows
from engine.parallel.mesh import Mesh
from engine.parallel.nccl import nccl_group
from engine.parallel.shared_memory import SharedMemoryCollectives
from engine.parallel.stage_join import join_stages

_FULL_COPY_BYTES = 256 * 1024
"""Largest tensor that gloo ranks exchange in full; see ``GlooCollectives.all_reduce``."""


class _GroupCollectives:
    """What gloo and NCCL have in common. ``group`` is a torch process group over the axis."""

    def __init__(self, group: Any, rank: int, size: int, timeout_s: float) -> None:
        self._group = group
        self._rank = rank
        self._size = size
        self._timeout = datetime.timedelta(seconds=timeout_s)

    @property
    def size(self) -> int:
        return self._size

    @property
    def rank(self) -> int:
        return self._rank

    def gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor | None:
        options = dist.GatherOptions()
        options.rootRank = 0
        tensor = tensor.contiguous()
        parts = [[torch.empty_like(tensor) for _ in range(self._size)]] if self._rank == 0 else []
        self._wait(self._group.gather(parts, [tensor], options), "gather")
        return torch.cat(parts[0], dim=-1) if parts else None

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        self._wait(self._group.allgather([parts], [tensor]), "all-gather")
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(self._group.broadcast([tensor], options), "broadcast")
        return tensor

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        rows = rows.contiguous()
        received = self._counts(counts, rows.device) if expected is None else expected
        output = rows.new_empty(int(received.sum()), rows.shape[1])
        work = self._group.alltoall_base(output, rows, received.tolist(), counts.tolist())

        def wait() -> tuple[torch.Tensor, torch.Tensor]:
            self._wait(work, f"all-to-all of {len(rows)} rows")
            return output, received

        return wait

    def _counts(self, counts: torch.Tensor, device: torch.device) -> torch.Tensor:
        """How many rows each rank sends to this one: [size] int64 on the CPU."""
        sent = counts.to(device)
        received = torch.empty_like(sent)
        self._wait(self._group.alltoall_base(received, sent, [], []), "all-to-all of counts")
        return received.cpu()

    def _wait(self, work: Any, operation: str) -> None:
        raise NotImplementedError


class GlooCollectives(_GroupCollectives):
    """Between CPU ranks. A dead peer is noticed at once, a silent one after the timeout."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Exchange by all-to-all and add up locally, always in the order of ranks.

        gloo's own all-reduce takes 4 to 7 ms for a few KB where ranks outnumber cores; this takes a tenth of it. All
        ranks add the same numbers in the same order, so they hold bitwise equal sums, and bfloat16 is rounded once.
        """
        size = self._size
        flat = tensor.contiguous().view(-1)
        if flat.numel() * flat.element_size() <= _FULL_COPY_BYTES or flat.numel() % size:
            copies = self._exchange(flat.repeat(size))
            return copies.view(size, -1).sum(0).view(tensor.shape)
        own_part = self._exchange(flat).view(size, -1).sum(0)
        return self._exchange(own_part.repeat(size)).view(tensor.shape)

    def _exchange(self, flat: torch.Tensor) -> torch.Tensor:
        """Part i of ``flat`` [size × n] goes to rank i; part i of the answer came from rank i."""
        received = torch.empty_like(flat)
        self._wait(self._group.alltoall_base(received, flat, [], []), "all-to-all")
        return received

    def _wait(self, work: Any, operation: str) -> None:
        try:
            # Without a timeout of its own a pending gloo operation cannot be interrupted at all.
            work.wait(self._timeout)
        except RuntimeError as error:
            raise RankFailure(
                f"{operation} with {self._size} ranks failed on rank {self._rank} of the axis within "
                f"{self._timeout.total_seconds():g} s: {error}"
            ) from error


class NcclCollectives(_GroupCollectives):
    """Between GPUs. Operations are queued on the current stream; NCCL's watchdog ends a rank whose peer is silent."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        self._wait(self._group.allreduce([tensor]), "all-reduce")
        return tensor

    def _wait(self, work: Any, operation: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise RankFailure(f"{operation} failed on rank {self._rank} of the axis: {error}") from error


def init_distributed(
    parallel: ParallelConfig,
    rank: int,
    store: dist.Store,
    device: torch.device,
    timeout_s: float = 60.0,
    bind_address: str = "127.0.0.1",
) -> Mesh:
    """Join the gang: meet its other ranks through ``store`` and return this rank's mesh.

    Args:
        parallel: the gang's degrees.
        rank: global rank.
        store: fresh for every epoch; made by the supervisor, not by a rank.
        device: where tensors live; decides between gloo and NCCL.
        timeout_s: bound of the rendezvous and of every collective.
        bind_address: this host's address that the other ranks reach (gloo listens there).

    Raises RankFailure where the ranks do not meet in time.
    """
    if parallel.num_ranks == 1:
        return Mesh(parallel, rank)
    mesh = Mesh(parallel, rank)
    try:
        tp = _neighbours("tp", parallel.tp, mesh, store, device, timeout_s, bind_address)
        stage = tp
        if parallel.dp > 1:
            # A dp group without work comes to an exchange while the others still are in the stages before.
            patience_s = timeout_s * (mesh.pp_rank + 1)
            stage = _neighbours("stage", parallel.dp * parallel.tp, mesh, store, device, patience_s, bind_address)
        previous, following = join_stages(replace(mesh, tp=tp), store, device, timeout_s, bind_address)
    except RuntimeError as error:
        raise RankFailure(f"rank {rank} did not meet its gang within {timeout_s:g} s: {error}", rank) from error
    return replace(mesh, tp=tp, stage=stage, previous=previous, next=following)


def _neighbours(
    name: str, size: int, mesh: Mesh, store: dist.Store, device: torch.device, timeout_s: float, bind_address: str
) -> Collectives:
    """Over the ``size`` neighbouring ranks that this one is among. ``name``: of the axis."""
    if size == 1:
        return LocalCollectives()
    rank = mesh.rank % size
    store = dist.PrefixStore(f"{name}-{mesh.rank // size}", store)
    if device.type == "cuda":
        return NcclCollectives(nccl_group(store, rank, size, timeout_s), rank, size, timeout_s)
    return _cpu_collectives(store, rank, size, timeout_s, bind_address)


def _cpu_collectives(store: dist.Store, rank: int, size: int, timeout_s: float, bind_address: str) -> Collectives:
    """Shared memory where all ranks of the axis are on one host, else gloo."""
    shared = SharedMemoryCollectives.join(store, rank, size, bind_address, timeout_s)
    if shared is not None:
        return shared
    gloo = _gloo_group(store, rank, size, datetime.timedelta(seconds=timeout_s), bind_address)
    return GlooCollectives(gloo, rank, size, timeout_s)


def _gloo_group(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, bind_address: str) -> Any:
    # The stubs lack the options class, through which alone the listening address can be given.
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_address)]
    return dist.ProcessGroupGloo(store, rank, size, options)
