"""The parts of deterministic mode, each against something that was not written for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.attention.backend import KvCacheView
from engine.attention.registry import attention_backend
from engine.batch import ForwardBatch
from engine.config import Determinism, KvGroupConfig, ParallelConfig
from engine.deterministic import deterministic_layout, num_canonical_shards
from engine.errors import InvalidOption, LayoutError
from engine.kernels.fixed_linear import _by_tiles, fixed_linear
from engine.layers.activation import silu_and_multiply
from engine.model_config import ModelConfig
from engine.parallel.ordered_sum import tree_sum

TINY = Path(__file__).parents[2] / "engine/assets/remuda-tiny"


@pytest.mark.parametrize("product", [fixed_linear, _by_tiles])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 96), (72, 50), (256, 300)])
def test_a_product_depends_on_its_rows_alone(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    generator = torch.Generator().manual_seed(num_inputs)
    hidden = torch.randn(67, num_inputs, generator=generator).to(dtype)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    whole = product(hidden, weight)
    exact = hidden.double() @ weight.double().t()
    bound = 0.02 if dtype is torch.bfloat16 else 1e-5
    assert (whole - exact).abs().max() < bound * exact.abs().max()
    for first, last in ((0, 1), (3, 4), (5, 38), (66, 67)):
        assert torch.equal(product(hidden[first:last], weight), whole[first:last])
    for first, last in ((0, 1), (7, 40), (num_outputs - 9, num_outputs)):
        assert torch.equal(product(hidden, weight[first:last]), whole[:, first:last])


def test_the_activation_of_a_row_does_not_depend_on_its_place() -> None:
    gate_and_up = torch.randn(9, 24)
    whole = silu_and_multiply(gate_and_up)
    assert torch.equal(torch.cat([silu_and_multiply(row[None]) for row in gate_and_up]), whole)


@pytest.mark.parametrize("group", [{}, {"chunk_size": 32}, {"window_size": 21}])
def test_fixed_attention_is_attention(group: dict[str, int]) -> None:
    torch.manual_seed(0)
    num_tokens, block_size = 150, 16
    config = KvGroupConfig((0,), **group)
    batch = ForwardBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.arange(num_tokens),
        query_lens=(num_tokens,),
        kv_lens=(num_tokens,),
        block_tables=(torch.arange(1, 11)[None],),
        slot_mapping=(torch.arange(num_tokens) + block_size,),
        logits_rows=torch.tensor([num_tokens - 1]),
        prompt_lens=(num_tokens,),
    )
    query, key, value = torch.randn(num_tokens, 6, 24), torch.randn(num_tokens, 2, 24), torch.randn(num_tokens, 2, 24)
    found = {}
    for name in ("fixed", "reference"):
        cache = KvCacheView((torch.zeros(12, block_size, 2, 24),), (torch.zeros(12, block_size, 2, 24),))
        step = attention_backend(name=name).plan(batch, [config], block_size)
        found[name] = step.forward(0, query, key, value, cache)
    torch.testing.assert_close(found["fixed"], found["reference"], rtol=1e-5, atol=1e-5)


def test_branches_of_the_tree_are_summed_by_themselves() -> None:
    summands = torch.randn(8, 5, 7)
    whole = tree_sum(summands)
    torch.testing.assert_close(whole.double(), summands.double().sum(0), rtol=1e-5, atol=1e-5)
    for num_ranks in (2, 4, 8):
        branches = torch.stack([tree_sum(branch) for branch in summands.chunk(num_ranks)])
        assert torch.equal(tree_sum(branches), whole)


def test_what_cannot_be_kept_is_refused() -> None:
    model = ModelConfig.from_directory(TINY)
    assert num_canonical_shards(model) == 8
    assert deterministic_layout(model, ParallelConfig(dp=2), Determinism.D1).is_deterministic
    with pytest.raises(LayoutError, match="dp=2"):
        deterministic_layout(model, ParallelConfig(dp=2), Determinism.D2)
    with pytest.raises(LayoutError, match="in 4 parts.*tp=8"):
        deterministic_layout(replace(model, num_heads=12), ParallelConfig(tp=8), Determinism.D2)
    with pytest.raises(InvalidOption, match="int8"):
        deterministic_layout(ModelConfig.from_directory(TINY, "int8"), ParallelConfig(), Determinism.D1)
    weights_alone = ModelConfig.from_directory(TINY, "int4")
    assert deterministic_layout(weights_alone, ParallelConfig(), Determinism.D1).num_shards == 1
