"""How many blocks, how long a context: checked against counting one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import KvGroupConfig, SchedulerConfig
from engine.errors import DoesNotFit, InvalidOption
from engine.executor.cache_size import cuda_kv_bytes, size_cache
from engine.executor.defaults import default_limits
from engine.kv_groups import num_blocks_needed
from engine.layer_config import LayerConfig
from engine.messages import Loaded
from engine.model_config import ModelConfig
from engine.rope_config import RopeConfig, RopeType

FULL = (KvGroupConfig((0, 1)),)
CHUNKED = (KvGroupConfig((0,)), KvGroupConfig((1,), 8), KvGroupConfig((2,), 8))


def loaded(rank: int, kv_bytes: int, block_bytes: int = 100) -> Loaded:
    return Loaded(rank, 5000, kv_bytes, block_bytes, {})


def test_the_rank_with_least_room_decides() -> None:
    size = size_cache([loaded(0, 1299), loaded(1, 1199), loaded(2, 2400, 200)], FULL, 4, 1000, None)
    assert size.num_blocks == 11
    # Ten of them can be handed out: 40 positions, and a last token that is never computed.
    assert size.max_model_len == 41


def test_a_context_is_never_longer_than_the_model_allows() -> None:
    assert size_cache([loaded(0, 10**6)], FULL, 4, 100, None).max_model_len == 100
    assert size_cache([loaded(0, 10**6)], FULL, 4, 100, 60).max_model_len == 60
    with pytest.raises(InvalidOption, match="100"):
        size_cache([loaded(0, 10**6)], FULL, 4, 100, 101)


@given(
    num_blocks=st.integers(0, 60),
    groups=st.sampled_from([FULL, CHUNKED]),
    block_size=st.integers(1, 9),
    longest=st.integers(2, 200),
)
def test_auto_is_the_longest_that_fits(
    num_blocks: int, groups: tuple[KvGroupConfig, ...], block_size: int, longest: int
) -> None:
    fitting = [n for n in range(2, longest + 1) if num_blocks_needed(groups, n - 1, block_size) <= num_blocks - 1]
    ranks = [loaded(0, num_blocks * 100 + 99)]
    if not fitting:
        with pytest.raises(DoesNotFit):
            size_cache(ranks, groups, block_size, longest, None)
        return
    assert size_cache(ranks, groups, block_size, longest, None).max_model_len == fitting[-1]
    assert size_cache(ranks, groups, block_size, longest, fitting[-1]).max_model_len == fitting[-1]
    if fitting[-1] < longest:
        with pytest.raises(DoesNotFit, match=f"at most {fitting[-1]}"):
            size_cache(ranks, groups, block_size, longest, fitting[-1] + 1)


def test_a_refusal_names_the_bytes() -> None:
    with pytest.raises(
        DoesNotFit, match=r"needs 26 KV blocks of 100 bytes = 2600 bytes.*rank 1 has 500 bytes"
    ) as error:
        size_cache([loaded(0, 1000), loaded(1, 500)], FULL, 4, 1000, 100)
    assert "--max-model-len to at most 17" in str(error.value)


def test_no_memory_at_all_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="has 0 bytes"):
        size_cache([loaded(0, -700)], FULL, 4, 1000, None)


def test_gpu_memory_is_what_others_and_the_peak_leave() -> None:
    # 100 in all, 40 free, 50 held by torch, so 10 belong to others; torch's peak was 60.
    assert cuda_kv_bytes(utilization=0.9, total=100, free=40, reserved=50, peak=60) == 90 - 10 - 60
    assert cuda_kv_bytes(utilization=0.5, total=100, free=40, reserved=50, peak=60) == -20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_defaults_are_legal(device: str) -> None:
    limits = default_limits(device)
    SchedulerConfig(max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens)


@pytest.mark.parametrize(
    ("kind", "original", "longest"),
    [
        (RopeType.DEFAULT, 4096, 4096),
        (RopeType.LINEAR, 4096, 16384),
        (RopeType.DYNAMIC, 4096, 16384),
        (RopeType.YARN, 4096, 16384),
        (RopeType.YARN, 1024, 4096),
        (RopeType.LLAMA3, 1024, 4096),
    ],
)
def test_the_longest_context_of_a_stretched_model(kind: RopeType, original: int, longest: int) -> None:
    """As vLLM derives it; a Llama 3 or YaRN checkpoint's own number counts where it is stretched already."""
    rope = RopeConfig(1e4, 4, original, kind, factor=4.0)
    assert ModelConfig("none", 9, 8, 2, 2, 4, (LayerConfig(8),), rope, 1e-5, 4096).max_context_len == longest
