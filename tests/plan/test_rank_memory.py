"""Building each distinct rank once gives every rank what it would get by itself; and ranks really hold it."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.control.memory import plan_memory
from cluster.plan.devices import parse_machines
from cluster.plan.layouts import Degrees
from cluster.plan.rank_memory import PlanOptions, weights_by_rank
from cluster.plan.search import LayoutSearch
from cluster.replica.events import ReplicaPlan
from engine.config import Dtype, LoadFormat, ParallelConfig
from engine.errors import DoesNotFit
from engine.executor.in_process import InProcessExecutor
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.models.shapes.registry import shapes_of
from engine.parallel.mesh import Mesh
from engine.quantization_config import MatrixFormat, QuantizationConfig, WeightFormat
from engine.weights.ledger import planned_bytes
from tests.plan.models import config_of, found, with_text

TINY = str(Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Llama-3.1-405B-FP8", ParallelConfig(tp=4, pp=2)),
        ("Llama-4-Maverick-17B-128E-Instruct-FP8", ParallelConfig(tp=4, ep=2, pp=2)),
        ("DeepSeek-V3", ParallelConfig(tp=4, ep=4)),
        ("Mixtral-8x7B", ParallelConfig(tp=2, dp=2, ep=4)),
        ("Qwen3-30B-A3B", ParallelConfig(tp=8, ep=2)),
    ],
)
def test_every_rank_by_itself(name: str, layout: ParallelConfig) -> None:
    shapes = shapes_of(with_text(config_of(name), num_hidden_layers=4))
    options = PlanOptions(Dtype.BFLOAT16, 8, 64)
    weights = weights_by_rank(shapes, layout, options)
    for rank in range(layout.num_ranks):
        assert weights[rank] == planned_bytes(shapes, Mesh(layout, rank), Dtype.BFLOAT16).by_kind


def test_a_vocabulary_that_is_not_padded() -> None:
    """GGUF's blocks are held as they are stored, so the last rank has fewer rows."""
    config = config_of("Llama-3.2-1B") | {"num_hidden_layers": 1, "vocab_size": 97}
    blocks = MatrixFormat(WeightFormat.GGUF, gguf_type="Q8_0")
    shapes = shapes_of(config).with_quantization(QuantizationConfig("GGUF", (), by_name={"model.embed_tokens": blocks}))
    layout, options = ParallelConfig(tp=4), PlanOptions(Dtype.BFLOAT16, 8, 64)
    weights = weights_by_rank(shapes, layout, options)
    for rank in range(4):
        assert weights[rank] == planned_bytes(shapes, Mesh(layout, rank), Dtype.BFLOAT16).by_kind
    assert weights[3]["embedding"] < weights[2]["embedding"] == weights[0]["embedding"]


def replica_plan(model: str, **changes: Any) -> ReplicaPlan:
    values: dict[str, Any] = {
        "model": model,
        "revision": None,
        "served_name": "m",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "expert_parallel_size": 1,
        "dtype": "bfloat16",
        "device": "cpu",
        "load_format": "safetensors",
        "max_model_len": None,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "gpu_memory_utilization": 0.9,
        "kv_cache_memory_bytes": 2**22,
    }
    return ReplicaPlan(**values | changes)


def worker_config(plan: ReplicaPlan) -> WorkerConfig:
    """As a rank of ``plan`` is told."""
    return WorkerConfig(
        rank=0,
        channel_address="",
        secret="",
        model=plan.model,
        tp=plan.tensor_parallel_size,
        ep=plan.expert_parallel_size,
        dtype=Dtype(plan.dtype),
        load_format=LoadFormat(plan.load_format),
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        kv_cache_memory_bytes=plan.kv_cache_memory_bytes,
        quantization=plan.quantization,
    )


@pytest.fixture
def odd_vocabulary(tmp_path: Path) -> str:
    """A dense float model whose vocabulary is padded where it is divided."""
    config = config_of("Llama-3.2-1B") | {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 4}
    config |= {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 1001,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_gang_holds_what_was_planned(odd_vocabulary: str, quantization: str | None) -> None:
    """Weights and cache of two ranks, to the byte: a float model with padding."""
    plan = replica_plan(
        odd_vocabulary, tensor_parallel_size=2, load_format="dummy", dtype="float32", quantization=quantization
    )
    _compare(plan, 2)


@pytest.mark.parametrize("quantization", [None, "int8", "fp8", "int4"])
def test_a_mixture_holds_what_was_planned(quantization: str | None) -> None:
    _compare(replica_plan(TINY, quantization=quantization), 1)


def test_a_quantized_mixture_over_two_ranks_holds_what_was_planned() -> None:
    _compare(replica_plan(TINY, quantization="int8", tensor_parallel_size=2, expert_parallel_size=2), 2)


def _compare(plan: ReplicaPlan, num_ranks: int) -> None:
    planned = plan_memory(plan, num_ranks)
    assert len(planned.weight_bytes) == num_ranks
    executor_class = InProcessExecutor if num_ranks == 1 else ProcessGang
    executor = executor_class(worker_config(plan))
    try:
        assert list(executor.ready.weight_bytes) == planned.weight_bytes
        assert executor.ready.cache.num_blocks == planned.num_blocks
    finally:
        executor.close()


def test_what_certainly_does_not_fit_is_refused() -> None:
    with pytest.raises(DoesNotFit, match=r"rank 0 lacks [\d,]+ bytes.*--kv-cache-memory \d+MiB would fit"):
        plan_memory(replica_plan(TINY, kv_cache_memory_bytes=2**50), 1)
    with pytest.raises(DoesNotFit, match=r"one request of 2,048 tokens needs .* --kv-cache-memory gives 4,096"):
        plan_memory(replica_plan(TINY, kv_cache_memory_bytes=4096, max_model_len=2048), 1)


def test_weights_that_are_too_large_for_the_host_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Llama-3.1-405B")))
    with pytest.raises(DoesNotFit, match="use --quantization, or more hosts"):
        plan_memory(replica_plan(str(tmp_path), load_format="dummy"), 1)


def test_of_other_hosts_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Llama-3.1-405B")))
    planned = plan_memory(replica_plan(str(tmp_path), tensor_parallel_size=8), 0)
    assert planned.weight_bytes == [101_470_601_216] * 8 and planned.num_blocks is None


def test_half_the_bits_need_half_the_devices() -> None:
    """A float checkpoint that is quantized while it is loaded is planned as it will be held."""
    model, machines = found("Llama-3.1-70B"), parse_machines("2xH100-80")
    shapes = model.shapes
    as_it_is = LayoutSearch(shapes, PlanOptions(Dtype.BFLOAT16, 64, 2048)).choose(machines, Degrees())
    online = shapes.with_quantization(shapes.config.quantized("int8").quantization)
    quantized = LayoutSearch(online, PlanOptions(Dtype.BFLOAT16, 64, 2048)).choose(machines, Degrees())
    assert 0.5 < quantized.ranks[0].weight_bytes / as_it_is.ranks[0].weight_bytes < 0.52


def test_a_rank_refuses_before_it_allocates(tmp_path: Path) -> None:
    """As it happens on a host whose memory nobody else knows: through the gang's own start."""
    (tmp_path / "config.json").write_text(json.dumps(config_of("Llama-3.1-405B")))
    plan = replica_plan(str(tmp_path), load_format="dummy")
    with pytest.raises(DoesNotFit, match=r"rank 0 lacks [\d,]+ bytes: its weights are 811,706,777,600"):
        InProcessExecutor(worker_config(plan))
