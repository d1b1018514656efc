"""The formula of activations against what torch's allocator counts while tokens of several groups meet at one rank."""

import pytest
import torch

from engine.attention.registry import attention_backend
from engine.config import Dtype, ParallelConfig
from engine.executor.activations import StepSize, activation_bytes, input_bytes
from engine.executor.kv_cache import allocate_kv_cache
from engine.executor.warm_up import run_largest_steps
from engine.layer_config import LayerConfig, MoeConfig
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.distributed import init_distributed
from engine.rope_config import RopeConfig
from engine.weights.dummy import fill_with_random_values
from tests.support.peak import peak_bytes
from tests.support.rank_pool import RankContext, run_ranks

pytestmark = pytest.mark.timeout(90)

CPU = torch.device("cpu")
NUM_TOKENS, NUM_REQUESTS = 1024, 4
CONFIG = ModelConfig(
    architecture="MixtralForCausalLM",
    vocab_size=500,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    layers=(LayerConfig(512, moe=MoeConfig(4, 2, 512, normalize_scores=True)),),
    rope=RopeConfig(1e4, 32, 4096),
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)


def largest_steps(context: RankContext, parallel: ParallelConfig, dtype: Dtype) -> int:
    """Peak bytes of one rank. All tokens of a warm-up are alike, so they meet at the same experts."""
    mesh = init_distributed(parallel, context.rank, context.store, CPU, 20.0)
    model = build_model(CONFIG, mesh, dtype, CPU)
    fill_with_random_values(model.slices, model.conversions, lambda done, total: None)
    cache = allocate_kv_cache(CONFIG, mesh, num_blocks=2, block_size=16, dtype=dtype, device=CPU)

    def work() -> None:
        run_largest_steps(
            model,
            mesh,
            cache,
            max_num_seqs=NUM_REQUESTS,
            max_num_batched_tokens=NUM_TOKENS,
            max_model_len=NUM_TOKENS,
            attention=attention_backend(),
            device=CPU,
        )

    return peak_bytes(work)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_the_formula_bounds_the_largest_steps(dtype: Dtype) -> None:
    parallel = ParallelConfig(dp=2, ep=2)
    measured = max(run_ranks(largest_steps, parallel.num_ranks, parallel, dtype))
    step = StepSize(NUM_TOKENS, NUM_REQUESTS, NUM_TOKENS)
    formula = activation_bytes(CONFIG, parallel, step, dtype) + input_bytes(step, 1, 16)
    # Kernels of some CPUs hold no widths of a whole expert in bfloat16, as the formula assumes.
    assert measured <= formula <= (3 if dtype is Dtype.BFLOAT16 else 2) * measured
