"""The byte ledger agrees with published parameter counts, with itself over ranks, and with real parameters."""

import json
from pathlib import Path

import pytest
import torch

from engine.config import Dtype, ParallelConfig
from engine.model_config import ModelConfig, kv_groups
from engine.models.registry import MODELS, build_model
from engine.parallel.mesh import Mesh
from engine.parameter import total_bytes
from engine.weights.ledger import kv_block_bytes, shard_bytes

DATA = Path(__file__).parents[1] / "data" / "models"
PARAMS = json.loads((DATA / "params.json").read_text())
SERVED = [
    "Llama-2-7B",
    "Llama-2-70B",
    "CodeLlama-34B",
    "Llama-3-8B",
    "Llama-3.1-405B",
    "Llama-3.2-1B",
    "Llama-3.3-70B-Instruct",
    "Llama-4-Scout-17B-16E-Instruct",
    "Llama-4-Maverick-17B-128E-Instruct",
    "Llama-Guard-4-12B",
    "Mixtral-8x7B",
    "Mixtral-8x22B",
    "Qwen3-30B-A3B",
]


def hub_model(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((DATA / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", SERVED)
def test_sizes_of_released_models(name: str) -> None:
    config, published = hub_model(name), PARAMS[name]
    ledger = shard_bytes(config, ParallelConfig(), 0, Dtype.BFLOAT16)
    assert ledger.total == 2 * (published["total"] - published["vision"])
    block = kv_block_bytes(config, Mesh(), 16, Dtype.BFLOAT16)
    assert block * len(kv_groups(config)) / 16 == published["kv_bytes_per_token_bf16"]


def test_scout_keeps_a_quarter_of_its_cache_past_the_chunk() -> None:
    config = hub_model("Llama-4-Scout-17B-16E-Instruct")
    num_full = sum(group.chunk_size is None for group in kv_groups(config))
    assert num_full * kv_block_bytes(config, Mesh(), 16, Dtype.BFLOAT16) / 16 == 49152


@pytest.mark.parametrize("layout", [{"tp": 8}, {"tp": 8, "ep": 8}, {"tp": 8, "ep": 2}])
def test_ranks_together_hold_the_model_once(layout: dict[str, int]) -> None:
    """What is divided adds up; what every rank holds (norms, router) is there tp times."""
    config, parallel = hub_model("Llama-4-Maverick-17B-128E-Instruct"), ParallelConfig(**layout)
    whole = shard_bytes(config, ParallelConfig(), 0, Dtype.BFLOAT16).by_kind
    shards = [shard_bytes(config, parallel, rank, Dtype.BFLOAT16).by_kind for rank in range(8)]
    for kind in ("embedding", "head", "attention", "experts"):
        assert sum(shard[kind] for shard in shards) == whole[kind]
    assert all(shard["norm"] == whole["norm"] for shard in shards)
    router_bytes = 24 * 128 * config.hidden_size * 2
    assert sum(shard["feed_forward"] - router_bytes for shard in shards) == whole["feed_forward"] - router_bytes


def test_every_element_is_loaded_exactly_once_over_the_ranks() -> None:
    """The ranks' slices of each divided tensor are disjoint and cover it."""
    text = json.loads((DATA / "Llama-4-Scout-17B-16E-Instruct.json").read_text())["text_config"]
    text |= {"architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 51}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4}
    config = ModelConfig.from_hf(text | {"intermediate_size": 16, "intermediate_size_mlp": 24})
    parallel = ParallelConfig(tp=4, ep=2)
    times_read: dict[str, torch.Tensor] = {}
    for rank in range(4):
        for piece in build_model(config, Mesh(parallel, rank), Dtype.FLOAT32, torch.device("meta")).slices:
            counts = times_read.setdefault(piece.name, torch.zeros(piece.shape, dtype=torch.int64))
            area = tuple(slice(s, s + n) for s, n in zip(piece.start, piece.destination.shape, strict=True))
            counts[area] += 1
    for name, counts in times_read.items():
        expected = 4 if "norm" in name or "router" in name else 1
        assert (counts == expected).all(), name


def test_the_ledger_is_what_is_allocated() -> None:
    config = hub_model("Llama-3.2-1B")
    small = ModelConfig(**{**vars(config), "layers": config.layers[:1], "vocab_size": 1001})
    for tp in (1, 4):
        parallel = ParallelConfig(tp=tp)
        for rank in range(tp):
            model = build_model(small, Mesh(parallel, rank), Dtype.BFLOAT16, torch.device("cpu"))
            assert isinstance(model, torch.nn.Module)
            allocated = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
            ledger = shard_bytes(small, parallel, rank, Dtype.BFLOAT16)
            assert ledger.total == allocated
            # The vocabulary's padding is allocated and not loaded.
            padding = (-1001 % tp) * 2048 * 2 if rank == tp - 1 else 0
            assert total_bytes(model.slices) == allocated - padding


def test_every_architecture_that_is_parsed_has_a_model() -> None:
    from engine.model_config import ARCHITECTURES

    assert set(MODELS) == set(ARCHITECTURES)
