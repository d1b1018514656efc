"""An engine on real ranks whose experts move."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import Output, Request
from engine.scheduler.expert_balancer import BalanceConfig, ExpertBalancer
from engine.scheduler.expert_layout import expert_layout
from engine.scheduler.expert_stats import ExpertStats

EAGER = BalanceConfig(interval_s=0.0, min_pairs_per_expert=1, least_gain=0.001, horizon_s=1e9)
"""Moves for whatever little it brings."""


class BalancedGang:
    """As if all ranks were on one host."""

    def __init__(self, config: WorkerConfig, balance: BalanceConfig, clock: Callable[[], float]) -> None:
        self.config = config
        self.gang = ProcessGang(config)
        self._model = model = ModelConfig.from_directory(config.model)
        hosts = ["host"] * config.parallel.num_ranks
        layout = expert_layout(model, config.parallel, hosts, config.dtype)
        self.balancer = ExpertBalancer(layout, clock, balance)
        self.engine = Engine(
            executor=self.gang,
            kv_groups=kv_groups(model, config.pp),
            num_dp_groups=config.dp,
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=self.gang.ready.max_model_len,
                depth=config.depth,
            ),
            cache_config=self.gang.ready.cache,
            input_references=config.pp == 1,
            experts=self.balancer,
        )

    def reform(self) -> None:
        """After a failure: new ranks for those that are gone, the others under a new epoch."""
        self.gang = self.gang.reform(self.engine.expert_placements)
        epoch = self.gang.config.epoch
        self.engine.reset(epoch, executor=self.gang, cache_config=self.gang.ready.cache)

    @property
    def stats(self) -> ExpertStats:
        found = self.engine.stats().experts
        assert found is not None
        return found

    def run(self, requests: list[Request]) -> dict[str, list[int]]:
        """The tokens of each."""
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for output in self.engine.step():
                outputs[output.request_id].append(output)
            self.engine.check_integrity()
        return {name: [token for output in found for token in output.token_ids] for name, found in outputs.items()}


@contextmanager
def balanced_gang(
    model: str, balance: BalanceConfig = EAGER, clock: Callable[[], float] = time.monotonic, **changes: Any
) -> Iterator[BalancedGang]:
    values: dict[str, Any] = {
        "rank": 0,
        "channel_address": "",
        "secret": "",
        "model": model,
        "dtype": Dtype.FLOAT32,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "kv_cache_memory_bytes": 2**20,
        "collective_timeout_s": 20.0,
        "balances_experts": True,
    }
    served = BalancedGang(WorkerConfig(**values | changes), balance, clock)
    try:
        yield served
    finally:
        served.gang.close()
