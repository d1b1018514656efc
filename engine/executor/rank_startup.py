"""From a connected channel to a rank that answers plans."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.attention.backend import KvCacheView
from engine.attention.registry import attention_backend
from engine.errors import ProtocolViolation, RankFailure
from engine.executor.cache_size import cuda_kv_bytes
from engine.executor.channel import RankChannel
from engine.executor.expert_mover import ExpertMover
from engine.executor.grammar_masks import GrammarMasks
from engine.executor.kv_cache import allocate_kv_cache
from engine.executor.memory_check import check_memory
from engine.executor.model_runner import CapturedSteps, ModelRunner
from engine.executor.warm_up import MIN_BLOCKS, run_largest_steps
from engine.executor.worker_config import WorkerConfig
from engine.kernels.gpu import has_triton
from engine.messages import (
    InitCache,
    Loaded,
    LoadProgress,
    Ready,
    Shutdown,
    StepPlan,
    StepResult,
    decode_to_rank,
    encode,
)
from engine.model_config import ModelConfig
from engine.models.registry import Model, build_model
from engine.parallel.distributed import init_distributed
from engine.parallel.mesh import Mesh
from engine.parallel.store import connect_store
from engine.slot_table import SlotTable
from engine.weights.expert_reader import ExpertReader
from engine.weights.ledger import held_bytes, kv_block_bytes
from engine.weights.load_check import HostShare
from engine.weights.loader import load_weights

_PROGRESS_INTERVAL_S = 0.1


class ReadyRank:
    """A rank that has loaded: takes plans from its channel."""

    def __init__(self, channel: RankChannel, runner: ModelRunner) -> None:
        self._channel = channel
        self._runner = runner

    def next_message(self) -> StepPlan | Shutdown:
        """Raises ChannelClosed, and ProtocolViolation for any other message."""
        message = decode_to_rank(self._channel.receive(None))
        if isinstance(message, InitCache):
            raise ProtocolViolation("the cache was sized already; it is sized once in an epoch")
        return message

    def execute(self, plan: StepPlan) -> StepResult:
        return self._runner.execute(plan)


def start_rank(config: WorkerConfig, channel: RankChannel, import_seconds: float) -> ReadyRank | None:
    """Tells the leader of its progress. None where the leader called it off. Raises what went wrong."""
    return _Startup(config, channel, import_seconds).run()


class _Startup:
    def __init__(self, config: WorkerConfig, channel: RankChannel, import_seconds: float) -> None:
        self._config = config
        self._channel = channel
        self._device = _device(config)
        self._phase_seconds = {"import": import_seconds}
        self._last_progress = 0.0

    def run(self) -> ReadyRank | None:
        config = self._config
        model_config = ModelConfig.from_directory(config.model, config.quantization)
        with self._phase("rendezvous"):
            store = self._connect_store()
            mesh = self._join(store)
        with self._phase("load"):
            check_memory(model_config, mesh, config.dtype, self._device, config.gpu_memory_utilization)
            model = build_model(model_config, mesh, config.dtype, self._device)
            share = _host_share(config)
            load_weights(model, config.model, config.load_format, self._report_bytes, share)
            experts = self._expert_mover(model, mesh)
            assert isinstance(model, torch.nn.Module)
            weight_bytes = held_bytes(model).total
            self._await_others(store)
        with self._phase("profile"):
            kv_bytes = self._profile(model, mesh)
        block_bytes = kv_block_bytes(model_config, mesh, config.block_size, config.dtype)
        self._send(Loaded(config.rank, weight_bytes, kv_bytes, block_bytes, dict(self._phase_seconds)))
        message = decode_to_rank(self._channel.receive(None))
        if isinstance(message, Shutdown):
            return None
        if not isinstance(message, InitCache) or message.epoch != config.epoch:
            raise ProtocolViolation(f"the size of the cache for epoch {config.epoch} is due, not {message!r}")
        with self._phase("warm_up"):
            if experts is not None:
                experts.begin_epoch(message.experts)
            cache = self._allocate(model, mesh, message.num_blocks)
            self._run_largest_steps(model, mesh, cache, message.max_model_len)
            captured = self._capture(model, mesh, cache, message.max_model_len)
        self._send(Ready(config.rank, dict(self._phase_seconds)))
        return ReadyRank(self._channel, self._runner(model, mesh, cache, message.num_blocks, captured, experts))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._send(LoadProgress(self._config.rank, name))
        began = time.perf_counter()
        yield
        self._phase_seconds[name] = time.perf_counter() - began

    def _send(self, message: LoadProgress | Loaded | Ready) -> None:
        self._channel.send(encode(message))

    def _connect_store(self) -> dist.Store | None:
        config = self._config
        if config.parallel.num_ranks == 1:
            return None
        try:
            store = connect_store(config.store_host, config.store_port, config.connect_timeout_s)
        except (RuntimeError, ValueError) as error:
            raise RankFailure(
                f"the rendezvous store at {config.store_host}:{config.store_port} cannot be reached: {error}",
                config.rank,
            ) from error
        return dist.PrefixStore(f"epoch-{config.epoch}", store)

    def _join(self, store: dist.Store | None) -> Mesh:
        config = self._config
        if store is None:
            return Mesh(config.parallel, config.rank)
        return init_distributed(
            config.parallel, config.rank, store, self._device, config.collective_timeout_s, config.bind_address
        )

    def _await_others(self, store: dist.Store | None) -> None:
        """Collectives wait for seconds, loading may take minutes: so ranks meet here before the first collective."""
        if store is None:
            return
        store.set(f"loaded/{self._config.rank}", "")
        others = [f"loaded/{rank}" for rank in range(self._config.parallel.num_ranks)]
        try:
            store.wait(others, timedelta(seconds=self._config.load_timeout_s))
        except RuntimeError as error:
            raise RankFailure(
                f"not all ranks had loaded within {self._config.load_timeout_s:g} s: {error}", self._config.rank
            ) from error

    def _report_bytes(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_progress >= _PROGRESS_INTERVAL_S:
            self._last_progress = now
            self._send(LoadProgress(self._config.rank, "load", done, total))

    def _profile(self, model: Model, mesh: Mesh) -> int:
        """Bytes for the KV cache. On CPU they are given; on CUDA they are what a largest step leaves over."""
        config = self._config
        if self._device.type != "cuda":
            return config.kv_cache_memory_bytes
        scratch = self._allocate(model, mesh, MIN_BLOCKS)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._run_largest_steps(model, mesh, scratch, model.config.max_context_len)
        peak = torch.cuda.max_memory_allocated(self._device)
        del scratch
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return cuda_kv_bytes(
            utilization=config.gpu_memory_utilization,
            total=total,
            free=free,
            reserved=torch.cuda.memory_reserved(self._device),
            peak=peak,
        )

    def _allocate(self, model: Model, mesh: Mesh, num_blocks: int) -> KvCacheView:
        return allocate_kv_cache(
            model.config,
            mesh,
            num_blocks=num_blocks,
            block_size=self._config.block_size,
            dtype=self._config.dtype,
            device=self._device,
        )

    def _run_largest_steps(self, model: Model, mesh: Mesh, cache: KvCacheView, max_model_len: int) -> None:
        run_largest_steps(
            model,
            mesh,
            cache,
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            max_model_len=max_model_len,
            device=self._device,
        )

    def _capture(self, model: Model, mesh: Mesh, cache: KvCacheView, max_model_len: int) -> CapturedSteps | None:
        """Decoding steps as CUDA graphs, of this epoch: they hold its communicator and cache."""
        if self._device.type != "cuda" or not has_triton():
            return None
        from engine.executor.cuda_graphs import DecodeGraphs, can_capture

        attention = attention_backend(self._device, is_deterministic=mesh.config.is_deterministic)
        if not can_capture(model, mesh, attention, self._device):
            return None
        return DecodeGraphs(
            model,
            cache,
            attention,
            mesh.kv_groups(model.config),
            max_num_seqs=self._config.max_num_seqs,
            max_model_len=max_model_len,
            device=self._device,
        )

    def _expert_mover(self, model: Model, mesh: Mesh) -> ExpertMover | None:
        if not mesh.config.balances_experts:
            return None
        reader = ExpertReader(self._config.model, model.config, self._config.load_format)
        return ExpertMover(model, mesh, reader, self._device)

    def _runner(
        self,
        model: Model,
        mesh: Mesh,
        cache: KvCacheView,
        num_blocks: int,
        captured: CapturedSteps | None,
        experts: ExpertMover | None,
    ) -> ModelRunner:
        config = self._config
        slots = SlotTable(
            num_slots=config.max_num_seqs,
            kv_groups=mesh.kv_groups(model.config),
            block_size=config.block_size,
            num_blocks=num_blocks,
            epoch=config.epoch,
            dp_group=mesh.dp_rank,
        )
        grammars = GrammarMasks(Path(config.model), model.config.vocab_size)
        return ModelRunner(model, mesh, cache, slots, grammars, device=self._device, captured=captured, experts=experts)


def _host_share(config: WorkerConfig) -> HostShare:
    if not config.host_ranks:
        return HostShare()
    return HostShare(config.host_ranks.index(config.rank), len(config.host_ranks))


def _device(config: WorkerConfig) -> torch.device:
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    return device
