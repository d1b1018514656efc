"""From a connected channel to a rank that answers plans, in each formation of the gang anew.

Weights are loaded once. What belongs to a formation (the groups of ranks, the KV cache's contents, captured steps, the
slot table) is made again each time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.attention.backend import AttentionBackend, KvCacheView
from engine.attention.registry import CHOICES, attention_backend
from engine.errors import ProtocolViolation, RankFailure
from engine.executor.cache_size import cuda_kv_bytes
from engine.executor.channel import ChannelClosed, RankChannel
from engine.executor.expert_mover import mixture_layers
from engine.executor.grammar_masks import GrammarMasks
from engine.executor.kv_cache import allocate_kv_cache
from engine.executor.late_samples import LateSamples, reads_late
from engine.executor.model_runner import CapturedSteps, ModelRunner
from engine.executor.rank_weights import RankWeights
from engine.executor.result_sender import ResultSender
from engine.executor.shard_peers import in_order_of_kinship
from engine.executor.shard_server import shard_served
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
    decode_to_rank,
    encode,
)
from engine.model_config import ModelConfig
from engine.models.registry import Model
from engine.parallel.distributed import init_distributed
from engine.parallel.formation_end import FormationEnd
from engine.parallel.mesh import Mesh
from engine.parallel.store import connect_store
from engine.progress import RankProgress
from engine.slot_table import SlotTable
from engine.weights.adapter_loader import drop_adapters
from engine.weights.ledger import held_bytes, kv_block_bytes, staged_expert_bytes

_PROGRESS_INTERVAL_S = 0.1


class ReadyRank:
    """A rank that has loaded: takes plans from its channel and answers them."""

    def __init__(self, channel: RankChannel, runner: ModelRunner) -> None:
        self._channel = channel
        self._runner = runner
        self._sender: ResultSender | None = None

    @contextmanager
    def answering(self, report: Callable[[int, Exception], None]) -> Iterator[None]:
        """While plans come. ``report``: see ResultSender."""
        if not self._runner.reads_late:
            yield
            return
        self._sender = ResultSender(self._channel, report)
        try:
            yield
        finally:
            self._sender.close()

    def next_message(self) -> StepPlan | Shutdown:
        """Raises ChannelClosed, ProtocolViolation for any other message, and what has failed on the device."""
        try:
            message = decode_to_rank(self._channel.receive(None))
        except ChannelClosed:
            if self._sender is not None:
                self._sender.raise_failure()
            raise
        if isinstance(message, InitCache):
            raise ProtocolViolation("the cache was sized already; it is sized once in an epoch")
        return message

    def answer(self, plan: StepPlan) -> None:
        """Computes it, or has the device do so while the next plan is taken. Raises what went wrong."""
        if self._sender is not None:
            self._sender.put(self._runner.launch(plan))
        else:
            self._channel.send(encode(self._runner.execute(plan)))


class Rank:
    """What a rank keeps from its first formation to its last: its weights, and the memory of its KV cache."""

    def __init__(self, config: WorkerConfig, import_seconds: float) -> None:
        self._device = _device(config)
        self._import_seconds = import_seconds
        self._model_config = ModelConfig.from_directory(config.model, config.quantization)
        self._grammars = GrammarMasks(Path(config.model), self._model_config.vocab_size, config.guided_decoding_backend)
        self._cache: KvCacheView | None = None
        self.weights = RankWeights(self._model_config, self._device)
        self.progress = RankProgress()

    def join(self, config: WorkerConfig, channel: RankChannel, end: FormationEnd) -> ReadyRank | None:
        """One formation up to readiness. Tells the leader of its progress. None where the leader called it off.

        Args:
            end: is told of all groups and links.

        Raises what went wrong.
        """
        return _Startup(self, config, channel, end).run()

    def cache(self, config: WorkerConfig, mesh: Mesh, num_blocks: int) -> KvCacheView:
        """Kept where it has the right size: a block is written before it is read."""
        if self._cache is None or len(self._cache.key_cache[0]) != num_blocks:
            self._cache = None
            self._cache = self.allocate(config, mesh, num_blocks)
        return self._cache

    def allocate(self, config: WorkerConfig, mesh: Mesh, num_blocks: int) -> KvCacheView:
        return allocate_kv_cache(
            self._model_config,
            mesh,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=config.dtype,
            device=self._device,
        )

    @property
    def model_config(self) -> ModelConfig:
        return self._model_config

    @property
    def device(self) -> torch.device:
        return self._device

    def take_import_seconds(self) -> float:
        """0 in all formations but the first."""
        taken, self._import_seconds = self._import_seconds, 0.0
        return taken

    @property
    def grammars(self) -> GrammarMasks:
        return self._grammars


class _Startup:
    def __init__(self, rank: Rank, config: WorkerConfig, channel: RankChannel, end: FormationEnd) -> None:
        self._rank = rank
        self._config = config
        self._channel = channel
        self._end = end
        self._device = rank.device
        self._phase_seconds = {"import": rank.take_import_seconds()}
        self._last_progress = 0.0

    def run(self) -> ReadyRank | None:
        config, model_config = self._config, self._rank.model_config
        model, mesh, loaded = self._meet_and_load()
        assert isinstance(model, torch.nn.Module)
        weight_bytes = held_bytes(model).total
        block_bytes = kv_block_bytes(model_config, mesh, config.block_size, config.dtype)
        with self._phase("profile"):
            # Of a gang that has served before the cache's size is known, and that its largest step fits.
            kv_bytes = config.num_blocks * block_bytes if config.num_blocks else self._profile(model, mesh)
        phase_seconds = dict(self._phase_seconds)
        self._send(Loaded(config.rank, weight_bytes, kv_bytes, block_bytes, phase_seconds, *loaded))
        message = decode_to_rank(self._channel.receive(None))
        if isinstance(message, Shutdown):
            return None
        if not isinstance(message, InitCache) or message.epoch != config.epoch:
            raise ProtocolViolation(f"the size of the cache for epoch {config.epoch} is due, not {message!r}")
        with self._phase("warm_up"):
            if self._rank.weights.experts is not None:
                self._rank.weights.experts.begin_epoch(message.experts)
            cache = self._rank.cache(config, mesh, message.num_blocks)
            if not config.num_blocks:
                self._run_largest_steps(model, mesh, cache, message.max_model_len)
            captured = self._capture(model, mesh, cache, message.max_model_len)
        self._send(Ready(config.rank, dict(self._phase_seconds)))
        return ReadyRank(self._channel, self._runner(model, mesh, cache, message.num_blocks, captured))

    def _meet_and_load(self) -> tuple[Model, Mesh, tuple[int, int, bool]]:
        """Ranks that have their weights give them to the others meanwhile. The last: what Loaded says of the load."""
        config, weights = self._config, self._rank.weights
        is_newcomer = weights.shard is None
        # A gang of one has nobody to give to.
        shard = weights.shard if config.parallel.num_ranks > 1 else None
        with shard_served(config.bind_address, config.secret, shard) as address:
            with self._phase("rendezvous"):
                store = self._connect_store()
                servers = self._await_others(store, "here", address)
                mesh = self._join(store)
            with self._phase("load"):
                peers = {rank: server for rank, server in enumerate(servers) if server}
                peers = in_order_of_kinship(peers, config.rank, config.parallel)
                model = weights.load(config, mesh, self._report_bytes, peers)
                self._await_others(store, "loaded")
        return model, mesh, (weights.num_bytes_from_peers, weights.num_bytes_from_disk, is_newcomer)

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
        self._rank.progress.attach(self._channel.progress_slot(), config.epoch)
        if store is None:
            return Mesh(config.parallel, config.rank, progress=self._rank.progress)
        return init_distributed(
            config.parallel,
            config.rank,
            store,
            self._device,
            config.collective_timeout_s,
            config.bind_address,
            self._end,
            self._rank.progress,
        )

    def _await_others(self, store: dist.Store | None, place: str, word: str = "") -> list[str]:
        """Collectives and their groups wait for seconds. Processes may take longer to start, and minutes to load, so
        ranks meet before both. Who waits in vain is freed by the end of the store. Returns every rank's ``word``."""
        if store is None:
            return []
        store.set(f"{place}/{self._config.rank}", word)
        others = [f"{place}/{rank}" for rank in range(self._config.parallel.num_ranks)]
        try:
            store.wait(others, timedelta(seconds=self._config.load_timeout_s))
            return [store.get(key).decode() for key in others]
        except RuntimeError as error:
            waited_s = self._config.load_timeout_s
            raise RankFailure(f"not all ranks were {place} within {waited_s:g} s: {error}") from error

    def _report_bytes(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_progress >= _PROGRESS_INTERVAL_S:
            self._last_progress = now
            with suppress(ChannelClosed):  # what is read serves in the next formation too
                self._send(LoadProgress(self._config.rank, "load", done, total))

    def _profile(self, model: Model, mesh: Mesh) -> int:
        """Bytes for the KV cache. On CPU they are given; on CUDA they are what a largest step leaves over."""
        config = self._config
        if self._device.type != "cuda":
            return config.kv_cache_memory_bytes
        scratch = self._rank.allocate(config, mesh, MIN_BLOCKS)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._run_largest_steps(model, mesh, scratch, model.config.max_context_len)
        peak = torch.cuda.max_memory_allocated(self._device)
        del scratch
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        assert isinstance(model, torch.nn.Module)
        experts_bytes, num_mixtures = held_bytes(model).by_kind.get("experts", 0), len(mixture_layers(model, mesh))
        return cuda_kv_bytes(
            utilization=config.gpu_memory_utilization,
            total=total,
            free=free,
            reserved=torch.cuda.memory_reserved(self._device),
            peak=peak,
        ) - staged_expert_bytes(experts_bytes, num_mixtures, mesh.config)

    def _run_largest_steps(self, model: Model, mesh: Mesh, cache: KvCacheView, max_model_len: int) -> None:
        run_largest_steps(
            model,
            mesh,
            cache,
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            max_model_len=max_model_len,
            attention=self._attention(mesh),
            device=self._device,
        )

    def _attention(self, mesh: Mesh) -> AttentionBackend:
        name = CHOICES[self._config.attention_backend]
        return attention_backend(self._device, name, is_deterministic=mesh.config.is_deterministic)

    def _capture(self, model: Model, mesh: Mesh, cache: KvCacheView, max_model_len: int) -> CapturedSteps | None:
        """Decoding steps as CUDA graphs, of this epoch: they hold its communicator and cache."""
        if self._device.type != "cuda" or not has_triton():
            return None
        from engine.executor.cuda_graphs import DecodeGraphs, can_capture

        attention = self._attention(mesh)
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

    def _runner(
        self,
        model: Model,
        mesh: Mesh,
        cache: KvCacheView,
        num_blocks: int,
        captured: CapturedSteps | None,
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
        grammars = self._rank.grammars
        grammars.forget(range(config.max_num_seqs))
        drop_adapters(model)  # those that are still wanted are loaded again by plans
        late = None
        if reads_late(self._device, mesh.config, config.attention_backend):
            late = LateSamples(slots, config.max_num_seqs, self._device)
        return ModelRunner(
            model,
            mesh,
            cache,
            slots,
            grammars,
            attention=self._attention(mesh),
            device=self._device,
            captured=captured,
            experts=self._rank.weights.experts,
            late=late,
        )


def _device(config: WorkerConfig) -> torch.device:
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    return device
