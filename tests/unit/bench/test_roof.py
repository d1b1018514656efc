"""The ceilings and what kernels and steps are divided by."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.limits import MemoryLimits, memory_buffer
from bench.rank_processes import on_ranks
from bench.roof_step import _kv_bytes, _noted_choices, _prefill_flops, _read_bytes
from engine.config import Dtype
from engine.layer_config import LayerConfig, MoeConfig
from engine.layers.router import SigmoidRouter
from engine.model_config import ModelConfig
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder
from engine.rope_config import RopeConfig
from tests.unit.bench.rank_functions import double_of_all, fails_on_one

SIZES = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def config(tied: bool) -> ModelConfig:
    rope = RopeConfig(theta=10000.0, head_dim=16, original_max_positions=1000)
    layers = (LayerConfig(96),) * 3
    return ModelConfig("LlamaForCausalLM", 512, 64, 4, 2, 16, layers, rope, 1e-5, 1000, tied, dtype=Dtype.BFLOAT16)


def transformers_model(tied: bool) -> LlamaForCausalLM:
    known = LlamaConfig(**SIZES, num_hidden_layers=3, intermediate_size=96, tie_word_embeddings=tied)
    with torch.device("meta"):
        return LlamaForCausalLM(known)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_once(tied: bool) -> None:
    model = transformers_model(tied)
    read = {id(p): p for p in model.parameters()}
    if not tied:
        del read[id(model.get_input_embeddings().weight)]
    num_bytes = 2 * sum(parameter.numel() for parameter in read.values())
    # Norms are held by each rank, and read by each.
    norms = 2 * sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    assert _read_bytes(config(tied), 1) == num_bytes
    assert _read_bytes(config(tied), 2) == num_bytes + norms


def test_prefill_work_is_that_of_its_matrices_and_attention() -> None:
    model = transformers_model(False)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name)
    num_tokens = 10
    pairs = sum(range(1, num_tokens + 1))
    attention = 3 * pairs * 4 * 16 * 2  # layers, (query, key) pairs, heads, head_dim; scores and values
    assert _prefill_flops(config(False), num_tokens) == 2 * (matrices * num_tokens + attention)


def test_a_mixture_reads_and_computes_what_its_tokens_use() -> None:
    moe = MoeConfig(num_experts=8, num_experts_per_token=2, intermediate_size=32, has_shared_expert=True)
    mixture = replace(
        config(True), architecture="Llama4ForCausalLM", layers=(LayerConfig(96), LayerConfig(96, moe=moe))
    )
    dense = replace(mixture, layers=(LayerConfig(96), LayerConfig(3 * 32)))
    assert _prefill_flops(mixture, 10) == _prefill_flops(dense, 10)
    of_one = 3 * 64 * 32 * 2
    assert _read_bytes(mixture, 1) - _read_bytes(mixture, 1, 3 / 8) == 5 * of_one


def test_choices_of_routers_are_noted() -> None:
    build = ParameterBuilder(Mesh(), torch.float32, torch.device("cpu"))
    router = SigmoidRouter(build, "router", 4, MoeConfig(4, 1, 32))
    router.weight.data.copy_(torch.eye(4))
    shares: list[float] = []
    with _noted_choices(shares):
        expert_ids, _ = router.forward(torch.eye(4)[[0, 2, 2]])
    assert expert_ids.flatten().tolist() == [0, 2, 2] and shares == [0.5]
    router.forward(torch.eye(4))
    assert shares == [0.5]


def test_keys_and_values_of_a_batch() -> None:
    assert _kv_bytes(config(False), 8, 100) == 8 * 100 * 3 * 2 * (2 * 16) * 2


def test_buffers_are_written_and_aligned() -> None:
    for huge_pages in (False, True):
        buffer = memory_buffer(3 * 4096, huge_pages)
        assert (buffer.nbytes, buffer.ctypes.data % 4096, int(buffer.sum())) == (3 * 4096, 0, 3 * 4096)


def test_reads_are_measured() -> None:
    figure = MemoryLimits(2, 1 << 22, 3, huge_pages=True).read()
    assert 0.01 < figure.lowest <= figure.median <= figure.highest < 10_000


def test_ranks_meet_and_return_in_order() -> None:
    assert on_ranks(2, 60.0, double_of_all, 5) == [[0, 10], [0, 10]]


@pytest.mark.full
def test_what_a_rank_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="of rank 1"):
        on_ranks(2, 60.0, fails_on_one)
