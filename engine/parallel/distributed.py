"""Collectives over torch.distributed process groups: gloo between CPU ranks of several hosts, NCCL between GPUs.

Groups are made directly from a store, without torch's global default group: after a fault a gang re-forms in the same
process with a fresh store and fresh groups, and several meshes may live side by side.
"""

import datetime
import threading
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from engine.config import ParallelConfig
from engine.errors import RankFailure
from engine.parallel.collectives import Collectives, LocalCollectives, ReceivedRows
from engine.parallel.formation_end import FormationEnd
from engine.parallel.mesh import Mesh
from engine.parallel.nccl import nccl_group
from engine.parallel.shared_memory import SharedMemoryCollectives
from engine.parallel.stage_join import join_stages
from engine.progress import Axis, AxisMarks, Operation, RankProgress

_FULL_COPY_BYTES = 256 * 1024
"""Largest tensor that gloo ranks exchange in full; see ``GlooCollectives.all_reduce``."""
_ABORT_CHECK_S = 0.1
"""While it waits for an operation, a rank looks so often whether the formation is over."""


class _GroupCollectives:
    """What gloo and NCCL have in common. ``group`` is a torch process group over the axis."""

    def __init__(self, group: Any, rank: int, size: int, timeout_s: float, marks: AxisMarks | None = None) -> None:
        self._group = group
        self._marks = marks or RankProgress().axis(Axis.TP)
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s

    def close(self) -> None:
        """See Endable. A pending operation holds gloo's group until its own timeout: only a thread of its own waits."""
        last, self._group = [self._group], None
        threading.Thread(target=last.clear, name="group-end", daemon=True).start()

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
        self._marks.enter(Operation.GATHER)
        self._wait(self._group.gather(parts, [tensor], options), Operation.GATHER)
        return torch.cat(parts[0], dim=-1) if parts else None

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        self._marks.enter(Operation.GATHER)
        self._wait(self._group.allgather([parts], [tensor]), Operation.GATHER)
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._marks.enter(Operation.BROADCAST)
        self._wait(self._group.broadcast([tensor], options), Operation.BROADCAST)
        return tensor

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        rows = rows.contiguous()
        received = self._counts(counts, rows.device) if expected is None else expected
        output = rows.new_empty(int(received.sum()), rows.shape[1])
        self._marks.enter(Operation.ALL_TO_ALL)
        work = self._group.alltoall_base(output, rows, received.tolist(), counts.tolist())

        def wait() -> tuple[torch.Tensor, torch.Tensor]:
            self._wait(work, Operation.ALL_TO_ALL)
            return output, received

        return wait

    def _counts(self, counts: torch.Tensor, device: torch.device) -> torch.Tensor:
        """How many rows each rank sends to this one: [size] int64 on the CPU."""
        sent = counts.to(device)
        received = torch.empty_like(sent)
        self._marks.enter(Operation.ALL_TO_ALL)
        self._wait(self._group.alltoall_base(received, sent, [], []), Operation.ALL_TO_ALL)
        return received.cpu()

    def _wait(self, work: Any, operation: Operation) -> None:
        raise NotImplementedError


class GlooCollectives(_GroupCollectives):
    """Between CPU ranks. A dead peer is noticed at once, a silent one after the timeout."""

    _has_aborted = False

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
        self._marks.enter(Operation.ALL_REDUCE)
        self._wait(self._group.alltoall_base(received, flat, [], []), Operation.ALL_REDUCE)
        return received

    def abort(self) -> None:
        """See Endable."""
        self._has_aborted = True

    def _wait(self, work: Any, operation: Operation) -> None:
        """In slices: nothing else interrupts a pending gloo operation, not even the end of its group."""
        deadline_s = time.monotonic() + self._timeout_s
        self._marks.wait(operation)
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            # Asked before: it may complete, and well, between the end of a slice and a question after it.
            was_completed = work.is_completed()
            try:
                # At least a millisecond: torch takes 0 for no limit.
                work.wait(datetime.timedelta(seconds=max(0.001, min(left_s, _ABORT_CHECK_S))))
                self._marks.resume()
                return
            except RuntimeError as error:
                if was_completed or self._has_aborted or left_s <= _ABORT_CHECK_S:
                    why = "the formation is over" if self._has_aborted else str(error)
                    raise RankFailure(
                        f"{operation.label} with {self._size} ranks failed on rank {self._rank} of the axis within "
                        f"{self._timeout_s:g} s: {why}"
                    ) from error


class NcclCollectives(_GroupCollectives):
    """Between GPUs. Operations are queued on the current stream; marks say which. NCCL's watchdog ends a rank whose
    peer is silent."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        self._marks.enter(Operation.ALL_REDUCE)
        self._wait(self._group.allreduce([tensor]), Operation.ALL_REDUCE)
        return tensor

    def abort(self) -> None:
        """See Endable: kernels that wait on the GPU end, and with them whoever waits for the GPU."""
        threading.Thread(target=self._group.abort, name="group-abort", daemon=True).start()

    def _wait(self, work: Any, operation: Operation) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise RankFailure(f"{operation.label} failed on rank {self._rank} of the axis: {error}") from error


def init_distributed(
    parallel: ParallelConfig,
    rank: int,
    store: dist.Store,
    device: torch.device,
    timeout_s: float = 60.0,
    bind_address: str = "127.0.0.1",
    end: FormationEnd | None = None,
    progress: RankProgress | None = None,
) -> Mesh:
    """Join the gang: meet its other ranks through ``store`` and return this rank's mesh.

    Args:
        parallel: the gang's degrees.
        rank: global rank.
        store: fresh for every epoch; made by the supervisor, not by a rank.
        device: where tensors live; decides between gloo and NCCL.
        timeout_s: bound of the rendezvous and of every collective.
        bind_address: this host's address that the other ranks reach (gloo listens there).
        end: is told of all groups and links as they are made.
        progress: where this rank notes what it does; attached already.

    Raises RankFailure where the ranks do not meet in time.
    """
    mesh = Mesh(parallel, rank, progress=progress or RankProgress())
    if parallel.num_ranks == 1:
        return mesh
    end = end or FormationEnd()
    try:
        tp = _neighbours(Axis.TP, parallel.tp, mesh, store, device, timeout_s, bind_address)
        _tell(end, tp)
        stage = tp
        if parallel.dp > 1:
            # A dp group without work comes to an exchange while the others still are in the stages before.
            patience_s = timeout_s * (mesh.pp_rank + 1)
            stage = _neighbours(Axis.STAGE, parallel.dp * parallel.tp, mesh, store, device, patience_s, bind_address)
            _tell(end, stage)
        previous, following = join_stages(replace(mesh, tp=tp), store, device, timeout_s, bind_address, end)
    except RuntimeError as error:
        raise RankFailure(f"rank {rank} did not meet its gang within {timeout_s:g} s: {error}", rank) from error
    return replace(mesh, tp=tp, stage=stage, previous=previous, next=following)


def _tell(end: FormationEnd, group: Collectives) -> None:
    if isinstance(group, SharedMemoryCollectives | GlooCollectives | NcclCollectives):
        end.add(group)


def _neighbours(
    axis: Axis, size: int, mesh: Mesh, store: dist.Store, device: torch.device, timeout_s: float, bind_address: str
) -> Collectives:
    """Over the ``size`` neighbouring ranks that this one is among."""
    if size == 1:
        return LocalCollectives()
    rank = mesh.rank % size
    store = dist.PrefixStore(f"{axis.name.lower()}-{mesh.rank // size}", store)
    marks = mesh.progress.axis(axis)
    if device.type == "cuda":
        return NcclCollectives(nccl_group(store, rank, size, timeout_s), rank, size, timeout_s, marks)
    return _cpu_collectives(store, rank, size, timeout_s, bind_address, marks)


def _cpu_collectives(
    store: dist.Store, rank: int, size: int, timeout_s: float, bind_address: str, marks: AxisMarks
) -> Collectives:
    """Shared memory where all ranks of the axis are on one host, else gloo."""
    shared = SharedMemoryCollectives.join(store, rank, size, bind_address, timeout_s, marks)
    if shared is not None:
        return shared
    gloo = _gloo_group(store, rank, size, datetime.timedelta(seconds=timeout_s), bind_address)
    return GlooCollectives(gloo, rank, size, timeout_s, marks)


def _gloo_group(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, bind_address: str) -> Any:
    # The stubs lack the options class, through which alone the listening address can be given.
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_address)]
    return dist.ProcessGroupGloo(store, rank, size, options)
