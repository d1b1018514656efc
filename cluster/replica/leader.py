"""A gang's leader: waits for its ranks, then runs the engine loop and the gRPC server. Knows no Ray and no torch."""

import asyncio
import functools
import logging
import os
import queue
import secrets
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec
import setproctitle

from cluster.errors import StartFailed
from cluster.replica.build import CHECKPOINT, check_same, software, with_checkpoint
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.events import (
    AdaptersChanged,
    BreaksExplained,
    DrainBegun,
    Event,
    Failed,
    Loading,
    Notice,
    PhaseStarted,
    RankLoaded,
    RankPlaced,
    ReplicaPlan,
    ReplicaReady,
    encode_event,
)
from cluster.replica.gang import Gang
from cluster.replica.heap import settle_heap
from cluster.replica.leader_load import LeaderLoad
from cluster.replica.model_source import ModelSource
from cluster.replica.rank_plan import GangEndpoints
from cluster.replica.record_file import leave_record
from cluster.replica.recorded_engine import RecordedEngine
from cluster.replica.self_test import SelfTest
from cluster.replica.server import LeaderServer
from cluster.telemetry.logs import log_as_json
from cluster.telemetry.tracing import open_telemetry
from cluster.types import RankInfo, ReplicaInfo, ReplicaState
from engine.config import CacheConfig, Dtype, LoraConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import AdapterError, EngineFailure, RemudaError
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.gang_start import GangReady
from engine.messages import FromRank, Hello, Loaded, LoadProgress
from engine.model_config import ModelConfig, kv_groups
from engine.scheduler.expert_balancer import ExpertBalancer
from engine.scheduler.expert_layout import ExpertLayout, expert_layout
from engine.weights.golden import read_golden

_log = logging.getLogger(__name__)

LEASE_S = 60.0
"""A leader that nobody polled for so long is an orphan and ends, and its ranks with it."""
STOP_GRACE_S = 5.0
_CLOSE_TIMEOUT_S = 10.0


class LeaderConfig(msgspec.Struct, frozen=True):
    """``host``: the leader's address, as its ranks and front ends reach it. ``rank_hosts``: each rank's."""

    replica_id: str
    plan: ReplicaPlan
    host: str
    rank_hosts: list[str]
    """At first."""
    secret: str
    is_draining: bool = False
    """It takes the place of one that was asked to take no new requests."""
    former_port: int = 0
    """Of the leader whose place it takes: front ends know it. 0: none. Where it stays in use, another one is taken."""

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return msgspec.json.decode(data, type=cls)


class Leader:
    """One life of a leader: ``open``, ``start``, then ``poll`` again and again, then ``stop``."""

    def __init__(self, config: LeaderConfig) -> None:
        setproctitle.setproctitle(f"remuda: leader {config.replica_id}")
        self._config = config
        if config.plan.log_format == "json":
            log_as_json("remuda-leader")
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._bytes_by_rank: dict[int, tuple[int, int]] = {}
        self._gang = Gang(
            config.replica_id,
            config.plan.parallel,
            config.host,
            self._events.put,
            self._on_gang_failure,
            lambda rank: self._hosts.get(rank, self._rank_hosts[rank]),
        )
        self._gang.record.describe(replica=config.replica_id, plan=msgspec.to_builtins(config.plan))
        self._rank_hosts = config.rank_hosts
        self._runs = software()
        """Every rank must run the same."""
        self._hosts: dict[int, str] = {}
        """Of the ranks that have joined the present formation, each's as ``status`` names it."""
        self._formed: tuple[int, ChannelExecutor] | None = None
        """The formation that serves: its epoch, and what computes in it."""
        self._ready: GangReady
        self._server: LeaderServer | None = None
        self._experts: ExpertBalancer | None = None
        self._loop: EngineLoop | None = None
        self._is_draining = config.is_draining
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_poll_s = time.monotonic()

    def open(self, epoch: int, rank_hosts: list[str]) -> GangEndpoints:
        """Listen for the ranks of a new formation, each on its host; the former one is over."""
        self._rank_hosts, self._hosts = rank_hosts, {}
        return self._gang.open(epoch, rank_hosts)

    def stay(self) -> None:
        """A formation will be opened, later."""
        self._gang.stay()

    def start(self) -> None:
        """Everything else happens in threads of its own; ``poll`` reports it."""
        self._last_poll_s = time.monotonic()
        self._thread = threading.Thread(target=self._live, name="leader", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def poll(self, wait_s: float) -> bytes:
        """Encoded events since the last call; waits for one, but not longer than ``wait_s``. Renews the lease."""
        self._last_poll_s = time.monotonic()
        lines = []
        try:
            lines.append(encode_event(self._events.get(timeout=wait_s)))
            while True:
                lines.append(encode_event(self._events.get_nowait()))
        except queue.Empty:
            return b"".join(lines)

    def load(self) -> LeaderLoad | None:
        """How busy the gang is; None before it serves."""
        if self._loop is None:
            return None
        load = self._loop.load()
        return LeaderLoad(self._loop.state, load.num_running, load.num_waiting, self._config.plan.num_slots)

    def drain(self) -> None:
        """Refuse new requests from now on; what runs may finish."""
        self._is_draining = True
        if self._loop is not None:
            self._loop.drain()

    def stop(self) -> None:
        """End the ranks and the server. Returns when both have ended."""
        self._stopping.set()
        # Also unblocks a start that still waits for ranks.
        self._gang.close()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _live(self) -> None:
        try:
            plan = self._config.plan
            directory = ModelSource(plan.model, plan.revision).directory()
            self._model = ModelConfig.from_directory(directory, plan.quantization)
            self._runs = with_checkpoint(self._runs, directory)
            epoch, executor, gang = self._gang.form(self._start_gang)
            self._formed = epoch, executor
            engine = self._make_engine(epoch, executor, gang)
            self._ready = gang
            seconds = self._self_test(engine, directory)
            asyncio.run(self._serve(engine, self._info(self._ready, {"self_test": seconds})))
        except Exception as error:  # noqa: BLE001  (whatever it was, it is reported)
            if not self._stopping.is_set():
                self._report(error)
        finally:
            self._gang.close()

    def _report(self, error: Exception) -> None:
        _log.error("the replica ended", exc_info=error)
        kind = type(error).__name__ if isinstance(error, RemudaError) else StartFailed.__name__
        self._events.put(Failed(kind, str(error), self._config.replica_id))

    def _start_gang(self, epoch: int, executor: ChannelExecutor) -> GangReady:
        self._bytes_by_rank.clear()
        return executor.start(
            self._model,
            block_size=CacheConfig().block_size,
            max_model_len=self._config.plan.max_model_len,
            on_message=functools.partial(self._on_message, epoch),
            experts=[] if self._experts is None else self._experts.placements(),
        )

    def _repair(self, engine: Engine, failure: EngineFailure) -> None:
        """In the engine loop's thread. Waits until the gang has formed anew; the engine then goes on where it was.
        Raises EngineFailure where it does not."""
        assert self._formed is not None
        leave_record(self._gang.record, self._config.replica_id)
        self._gang.end(*self._formed, failure)
        try:
            epoch, executor, gang = self._gang.form(self._start_gang)
        except StartFailed as error:
            raise EngineFailure(str(error)) from error
        self._formed, self._ready = (epoch, executor), gang
        engine.reset(epoch, executor=executor, cache_config=self._cache_config(gang))
        if self._experts is not None:  # ranks may have moved
            self._experts.set_layout(self._expert_layout(gang))
        if self._server is not None:
            self._server.set_ranks(self._info(gang).ranks, gang.phase_seconds)

    def _self_test(self, engine: Engine, directory: Path) -> float:
        """Returns how many seconds it took. A rank that is lost meanwhile is replaced, and the test begins anew.
        Raises SelfTestFailed, and CheckpointError where the golden file is none."""
        self._events.put(PhaseStarted("self_test", self._config.replica_id))
        golden = read_golden(directory)
        begun_s = time.monotonic()
        while True:
            test = SelfTest(self._config.plan, directory, self._model, self._ready.max_model_len)
            try:
                done = test.run(engine, golden)
            except EngineFailure as error:
                if self._stopping.is_set():
                    raise
                self._repair(engine, error)
            else:
                seconds = time.monotonic() - begun_s
                _log.info("replica %s: %s in %.2f s", self._config.replica_id, done, seconds)
                return seconds

    def _cache_config(self, gang: GangReady) -> CacheConfig:
        keeps_prefixes = gang.cache.keeps_prefixes and self._config.plan.enable_prefix_caching
        return replace(gang.cache, keeps_prefixes=keeps_prefixes)

    def _make_engine(self, epoch: int, executor: ChannelExecutor, gang: GangReady) -> Engine:
        plan, model = self._config.plan, self._model
        scheduler = SchedulerConfig(
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=gang.max_model_len,
            depth=plan.depth,
        )
        self._experts = self._balancer(gang)
        engine = RecordedEngine(
            self._gang.record,
            self._tell_explained,
            executor=executor,
            epoch=epoch,
            kv_groups=kv_groups(model, plan.pipeline_parallel_size),
            num_dp_groups=plan.data_parallel_size,
            # Stages work on different plans: what is sampled comes to the first through the next plan.
            input_references=plan.pipeline_parallel_size == 1,
            vocab_size=model.vocab_size,
            scheduler_config=scheduler,
            cache_config=self._cache_config(gang),
            lora_config=LoraConfig(plan.max_loras, plan.max_lora_rank),
            experts=self._experts,
            model_identity=f"{self._runs[CHECKPOINT]} {plan.dtype} {plan.quantization}",
            clock=self._gang.times.moment,
        )
        self._load_adapters(engine)
        return engine

    def _tell_explained(self, num_breaks: int) -> None:
        self._events.put(BreaksExplained(self._config.replica_id, num_breaks))

    def _balancer(self, gang: GangReady) -> ExpertBalancer | None:
        """Where there is one ep rank there is nothing to balance."""
        if self._config.plan.expert_parallel_size == 1:
            return None
        return ExpertBalancer(self._expert_layout(gang), time.monotonic)

    def _expert_layout(self, gang: GangReady) -> ExpertLayout:
        plan = self._config.plan
        hosts = [self._rank_hosts[hello.rank] for hello in gang.ranks]
        return expert_layout(self._model, plan.parallel, hosts, Dtype(plan.dtype))

    def _load_adapters(self, engine: Engine) -> None:
        """Those that are there from the beginning. Raises AdapterError, but not where a leader served before: it may
        have been told to load what is gone now."""
        for name, path in self._config.plan.lora_modules.items():
            self._events.put(PhaseStarted("adapters", self._config.replica_id))
            try:
                loaded = engine.load_adapter(name, path)
                while not loaded.done():
                    engine.step()
                loaded.result()
            except AdapterError as error:
                if not self._config.former_port:
                    raise
                self._events.put(Notice(f"replica {self._config.replica_id} goes on without adapter {name}: {error}"))

    def _info(self, gang: GangReady, further_seconds: dict[str, float] | None = None) -> ReplicaInfo:
        return ReplicaInfo(
            id=self._config.replica_id,
            model=self._config.plan.served_name,
            state=ReplicaState.READY,
            address="",
            incarnation=secrets.randbits(63),
            max_model_len=gang.max_model_len,
            max_num_seqs=self._config.plan.num_slots,
            max_loras=self._config.plan.max_loras,
            block_size=gang.cache.block_size,
            num_blocks=gang.cache.num_blocks,
            ranks=tuple(
                RankInfo(
                    hello.rank,
                    hello.pid,
                    self._host_of(hello),
                    hello.device,
                    "ready",
                    weight_bytes_from_peers=loaded.num_bytes_from_peers,
                    weight_bytes_from_disk=loaded.num_bytes_from_disk,
                )
                for hello, loaded in zip(gang.ranks, gang.loaded, strict=True)
            ),
            phase_seconds=gang.phase_seconds | (further_seconds or {}),
        )

    def _host_of(self, hello: Hello) -> str:
        """With the address: several hosts may bear one name."""
        return f"{hello.host} ({self._rank_hosts[hello.rank]})"

    def _on_message(self, epoch: int, message: FromRank) -> None:
        replica = self._config.replica_id
        if isinstance(message, Hello):
            host = self._host_of(message)
            check_same(f"rank {message.rank} on {host}", message.runs, self._config.host, self._runs)
            self._hosts[message.rank] = host
            self._events.put(RankPlaced(replica, message.rank, message.pid, host, message.device, epoch))
        elif isinstance(message, Loaded):
            self._events.put(RankLoaded(replica, message.rank, message.weight_bytes, epoch))
        elif isinstance(message, LoadProgress):
            if message.num_bytes_total:
                self._bytes_by_rank[message.rank] = (message.num_bytes_done, message.num_bytes_total)
                done, total = (sum(column) for column in zip(*self._bytes_by_rank.values(), strict=True))
                self._events.put(Loading(replica, done, total))
            else:
                self._events.put(PhaseStarted(message.phase, replica))

    def _on_gang_failure(self, epoch: int, error: RemudaError) -> None:
        """Without this an idle replica would learn of a lost rank from its next request."""
        if self._loop is not None:
            self._loop.fail(error, lambda: self._formed is not None and self._formed[0] <= epoch)

    async def _serve(self, engine: Engine, info: ReplicaInfo) -> None:
        failure: asyncio.Future[RemudaError] = asyncio.get_running_loop().create_future()
        self._loop = EngineLoop(engine, repair=functools.partial(self._repair, engine))
        assert self._formed is not None
        if (broken := self._formed[1].failure) is not None:  # nobody was told: there was no loop yet
            self._loop.fail(broken)
        tls = self._config.plan.cluster_tls
        telemetry = open_telemetry(self._config.plan.otlp_endpoint, "remuda-leader", info.id)
        server = self._server = LeaderServer(
            self._loop,
            info,
            bind=f"{self._config.host}:{self._config.plan.leader_port or self._config.former_port}",
            needs_port=bool(self._config.plan.leader_port),
            is_successor=bool(self._config.former_port),
            secret=self._config.secret,
            credentials=None if tls is None else tls.server_credentials(),
            on_failure=failure.set_result,
            on_drain=lambda: self._events.put(DrainBegun(info.id)),
            on_adapters=lambda adapters: self._events.put(AdaptersChanged(info.id, adapters)),
            gang=lambda: None if self._formed is None else self._formed[1],
            record=self._gang.record,
            tracer=telemetry.tracer,
        )
        address = await server.start()
        if self._is_draining:
            await server.drain()
        settle_heap()
        self._events.put(ReplicaReady(info.id, address, info.num_blocks))
        stop = asyncio.create_task(asyncio.to_thread(self._stopping.wait))
        ends: list[asyncio.Future[Any]] = [stop, failure]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            self._report(failure.result())
            # Front ends learn of it from the server, so it stays until the supervisor says stop.
            await stop
        await server.stop(STOP_GRACE_S)
        await asyncio.to_thread(telemetry.close)

    def _watch_lease(self) -> None:
        while not self._stopping.wait(1.0):
            if time.monotonic() - self._last_poll_s > LEASE_S:
                _log.error("no supervisor asked for %g s; ending", LEASE_S)
                self.stop()
                os._exit(1)
