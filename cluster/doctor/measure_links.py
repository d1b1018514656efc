"""One rank's part in measuring the links between all ranks, over what will really carry their data: the collectives of
a gang of two, and between hosts a TCP connection as the step channel's.

Pairs take turns, so that no host is in two at once; a barrier in the store ends each turn.
"""

import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from cluster.doctor import measure_tcp
from cluster.doctor.config import visible_devices
from cluster.doctor.facts import LinkFacts, RankFacts, RankQuestion
from cluster.doctor.rounds import begun_key
from engine.config import ParallelConfig
from engine.errors import RemudaError
from engine.executor import sockets
from engine.parallel.collectives import Collectives
from engine.parallel.distributed import init_distributed
from engine.parallel.store import connect_store

SMALL_BYTES = 8192
_STORE_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 30.0
"""Importing torch takes ranks different times; who takes longer is left out."""
_MEET_TIMEOUT_S = 10.0
_TURN_TIMEOUT_S = 60.0
_SMALL_S, _MAX_SMALL = 0.15, 300
_LARGE_S = 0.2
_MIN_LARGE_BYTES, _MAX_LARGE_BYTES = 64 * 1024, 8 * 2**20
_MEMORY_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


def measure_rank(argument: bytes) -> bytes:
    """RankQuestion → RankFacts, both encoded."""
    question = msgspec.msgpack.decode(argument, type=RankQuestion)
    torch.set_num_threads(1)
    return msgspec.msgpack.encode(_Rank(question).run())


class _Rank:
    def __init__(self, question: RankQuestion) -> None:
        self._question = question
        self._rank = question.rank
        self._device = torch.device("cuda", 0) if question.on_gpu else torch.device("cpu")
        self._present: frozenset[int] = frozenset()
        self._store = connect_store(question.store_host, question.store_port, _STORE_TIMEOUT_S)

    def run(self) -> RankFacts:
        self._present = self._gather()
        rate = 0.0 if self._question.tcp_only else memory_rate(self._device)
        links = []
        for number, pairs in enumerate(self._question.rounds):
            self._meet(number)
            for first, second in pairs:
                if self._rank == first and second in self._present:
                    links.append(self._measure(first, second))
                elif self._rank == second and first in self._present:
                    self._help(first, second)
        name = torch.cuda.get_device_name(self._device) if self._question.on_gpu else "cpu"
        return RankFacts(self._rank, name, visible_devices(), rate, tuple(links))

    def _gather(self) -> frozenset[int]:
        """The ranks that reach the store. One that waited in vain for the others decides, for all alike."""
        keys = [f"present/{rank}" for rank in range(len(self._question.hosts))]
        self._store.set(keys[self._rank], "")
        try:
            self._store.wait(keys, timedelta(seconds=_START_TIMEOUT_S))
        except RuntimeError:
            came = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        else:
            came = list(range(len(keys)))
        decided = self._store.compare_set("present", "", " ".join(map(str, came)))
        present = frozenset(int(rank) for rank in decided.split())
        if self._rank not in present:
            raise TimeoutError(f"came more than {_START_TIMEOUT_S:.0f} s after the first rank")
        return present

    def _meet(self, number: int) -> None:
        """Wait until all ranks that are present are here."""
        if self._store.add(f"turn/{number}", 1) == len(self._present):
            self._store.set(begun_key(number), "")
        self._store.wait([begun_key(number)], timedelta(seconds=_TURN_TIMEOUT_S))

    def _measure(self, first: int, second: int) -> LinkFacts:
        hosts = self._question.hosts
        facts = LinkFacts(first, second)
        try:
            if hosts[first] != hosts[second]:
                self._store.wait([f"{first}-{second}/address"], timedelta(seconds=_MEET_TIMEOUT_S))
                tcp = measure_tcp.ask(self._store.get(f"{first}-{second}/address").decode())
                facts = msgspec.structs.replace(
                    facts, channel_s=tcp.round_trip_s, channel_bytes_per_s=tcp.bytes_per_s, lost_share=tcp.lost_share
                )
            if self._question.tcp_only:
                return facts
            collectives = self._collectives(first, second)
            facts = msgspec.structs.replace(facts, transport=transport_name(collectives))
            small_s, rate = self._all_reduce(first, second, collectives, facts.channel_bytes_per_s)
            return msgspec.structs.replace(facts, collective_s=small_s, collective_bytes_per_s=rate)
        except (OSError, RuntimeError, RemudaError) as error:
            return msgspec.structs.replace(facts, error=_reason(error))

    def _help(self, first: int, second: int) -> None:
        """The second rank of a pair: what goes wrong, the first sees too, and tells."""
        hosts = self._question.hosts
        try:
            if hosts[first] != hosts[second]:
                listener, address = sockets.listen(f"tcp:{hosts[second]}:0")
                with listener:
                    self._store.set(f"{first}-{second}/address", address)
                    measure_tcp.answer(listener)
            if not self._question.tcp_only:
                self._all_reduce(first, second, self._collectives(first, second), None)
        except (OSError, RuntimeError, RemudaError):
            return

    def _collectives(self, first: int, second: int) -> Collectives:
        store = dist.PrefixStore(f"{first}-{second}", self._store)
        place = 0 if self._rank == first else 1
        bind_address = self._question.hosts[self._rank]
        gang = ParallelConfig(tp=2)
        return init_distributed(gang, place, store, self._device, _MEET_TIMEOUT_S, bind_address).tp

    def _all_reduce(
        self, first: int, second: int, collectives: Collectives, link_rate: float | None
    ) -> tuple[float, float]:
        """Median seconds of a small one, and bytes per second of a large one. How many and how large, the first rank
        decides by what it has seen, and tells the second through the store."""
        small = torch.ones(SMALL_BYTES // 4, device=self._device)
        once_s = statistics.median(self._timed(collectives, small) for _ in range(3))
        num_small = self._agree(first, second, "small", int(min(_MAX_SMALL, max(5, _SMALL_S / once_s))))
        small_s = statistics.median(self._timed(collectives, small) for _ in range(num_small))
        wanted = _MAX_LARGE_BYTES if link_rate is None else link_rate * _LARGE_S
        size = self._agree(first, second, "size", int(min(_MAX_LARGE_BYTES, max(_MIN_LARGE_BYTES, wanted))))
        large = torch.ones(size // 8 * 2, device=self._device)
        once_s = self._timed(collectives, large)
        num_large = self._agree(first, second, "large", int(min(10, max(1, _LARGE_S / once_s))))
        large_s = statistics.median(self._timed(collectives, large) for _ in range(num_large))
        return small_s, large.numel() * 4 / large_s

    def _agree(self, first: int, second: int, what: str, number: int) -> int:
        key = f"{first}-{second}/{what}"
        if self._rank == first:
            self._store.set(key, str(number))
            return number
        self._store.wait([key], timedelta(seconds=_MEET_TIMEOUT_S))
        return int(self._store.get(key))

    def _timed(self, collectives: Collectives, tensor: torch.Tensor) -> float:
        begun_s = time.monotonic()
        collectives.all_reduce(tensor.clone())
        self._finish()
        return time.monotonic() - begun_s

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def memory_rate(device: torch.device) -> float:
    """Bytes per second at which a device adds up a long row of numbers, which is to say reads it."""
    numbers = torch.ones(_MEMORY_BYTES[device.type] // 4, device=device)

    def read() -> float:
        begun_s = time.monotonic()
        numbers.sum().item()
        return time.monotonic() - begun_s

    return numbers.numel() * 4 / statistics.median(_times(read, 5))


def _times(measure: Callable[[], float], count: int) -> list[float]:
    measure()
    return [measure() for _ in range(count)]


def transport_name(collectives: Collectives) -> str:
    """``SharedMemoryCollectives`` → shared memory."""
    name = type(collectives).__name__.removesuffix("Collectives")
    return {"SharedMemory": "shared memory"}.get(name, name.lower())


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200]
