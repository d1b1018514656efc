"""``remuda verify --golden``: records what a checkpoint's model gives, through a gang of this command's own."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.config import ServeConfig
from cluster.control.preflight import preflight
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from cluster.replica.events import ReplicaPlan
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.rank_plan import GangEndpoints, worker_configs
from cluster.replica.self_test import NUM_TOKENS, SelfTest
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.executor.process_gang import ProcessGang
from engine.model_config import ModelConfig, kv_groups
from engine.weights.golden import write_golden

TEXTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who lived with her grandmother at the edge of a large forest. Every day",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "1, 2, 4, 8, 16, 32,",
)
"""What every language model has something to say on: prose short and long, code, and numbers."""


@dataclass(frozen=True)
class Recorded:
    """Where it was written, and how much of it there is."""

    path: Path
    num_prompts: int
    num_tokens: int


def record(config: ServeConfig) -> Recorded:
    """Start the gang that ``config`` asks for, without Ray and on this host, record, and write the file.

    Raises what the start of a gang raises, SelfTestFailed, and CheckpointError.
    """
    checked = preflight(config)
    plan, directory = checked.launch.replica, checked.directory
    tokenizer = Tokenizer(read_model_files(directory))
    hosts = [PlacedRank(rank, "127.0.0.1") for rank in range(plan.parallel.num_ranks)]
    worker = worker_configs(plan, hosts, GangEndpoints("127.0.0.1", "", "", ""), "127.0.0.1", 0)[0]
    worker = msgspec.structs.replace(worker, model=str(directory))
    gang = ProcessGang(worker, max_model_len=plan.max_model_len)
    try:
        max_model_len = gang.ready.max_model_len
        prompts = [(text, tokenizer.encode(text)) for text in TEXTS]
        prompts = [(text, ids) for text, ids in prompts if len(ids) + NUM_TOKENS <= max_model_len]
        if not prompts:
            raise CheckpointError(f"{directory} is served with {max_model_len} tokens, too few for any golden prompt")
        test = SelfTest(plan, directory, checked.model, max_model_len)
        golden = test.record(_engine(plan, checked.model, gang), prompts)
    finally:
        gang.close()
    return Recorded(write_golden(directory, golden), len(prompts), NUM_TOKENS)


def _engine(plan: ReplicaPlan, model: ModelConfig, gang: ProcessGang) -> Engine:
    return Engine(
        executor=gang,
        kv_groups=kv_groups(model, plan.pipeline_parallel_size),
        vocab_size=model.vocab_size,
        scheduler_config=SchedulerConfig(
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=gang.ready.max_model_len,
            depth=plan.depth,
        ),
        cache_config=gang.ready.cache,
        num_dp_groups=plan.data_parallel_size,
        input_references=plan.pipeline_parallel_size == 1,
    )
