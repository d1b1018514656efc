"""How many KV blocks a gang gets, and how long a context may be. Pure arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import KvGroupConfig
from engine.errors import DoesNotFit, InvalidOption
from engine.kv_groups import num_blocks_needed
from engine.messages import Loaded

MIN_MODEL_LEN = 2
"""A prompt of one token and one answer."""


@dataclass(frozen=True)
class CacheSize:
    """``num_blocks`` counts block 0, which is never handed out."""

    num_blocks: int
    max_model_len: int


def size_cache(
    loaded: Sequence[Loaded],
    groups: Sequence[KvGroupConfig],
    block_size: int,
    longest: int,
    max_model_len: int | None,
) -> CacheSize:
    """Block ids are equal on all ranks, so the rank that can hold fewest decides.

    Args:
        loaded: what each rank has to give.
        longest: tokens of the longest context that the model was made for.
        max_model_len: what the user asked for; None: the longest that fits, up to ``longest``.

    Raises DoesNotFit, naming the bytes and what would fit, where not even one such context fits, and InvalidOption
    where the model was not made for it.
    """
    if max_model_len is not None and max_model_len > longest:
        raise InvalidOption(f"max-model-len {max_model_len} is more than the model's {longest} positions")
    tightest = min(loaded, key=lambda rank: rank.kv_bytes_available // rank.block_bytes)
    num_blocks = tightest.kv_bytes_available // tightest.block_bytes
    num_usable = max(num_blocks - 1, 0)
    fitting = longest_fitting(groups, block_size, num_usable, longest)
    wanted = max_model_len or max(fitting, MIN_MODEL_LEN)
    if wanted > fitting:
        needed = num_blocks_needed(groups, wanted - 1, block_size) + 1
        advice = f", or --max-model-len to at most {fitting}" if fitting >= MIN_MODEL_LEN else ""
        raise DoesNotFit(
            f"one context of {wanted} tokens needs {needed} KV blocks of {tightest.block_bytes} bytes = "
            f"{needed * tightest.block_bytes} bytes on each rank; rank {tightest.rank} has "
            f"{max(tightest.kv_bytes_available, 0)} bytes left for them beside {tightest.weight_bytes} of weights: "
            f"give the cache more memory (--kv-cache-memory on CPU, --gpu-memory-utilization on CUDA, or more ranks)"
            f"{advice}"
        )
    return CacheSize(num_blocks, wanted)


def longest_fitting(groups: Sequence[KvGroupConfig], block_size: int, num_usable: int, longest: int) -> int:
    """The largest length up to ``longest`` whose blocks fit; 1 where none does. A request's last token is never
    computed, so it needs no place."""
    low, high = 1, longest
    while low < high:
        middle = (low + high + 1) // 2
        if num_blocks_needed(groups, middle - 1, block_size) <= num_usable:
            low = middle
        else:
            high = middle - 1
    return low


def cuda_kv_bytes(*, utilization: float, total: int, free: int, reserved: int, peak: int) -> int:
    """Bytes of a GPU that may go to KV blocks, possibly negative.

    Args:
        utilization: share of the GPU's memory that this rank may use in all.
        total, free: of the GPU, as its driver counts.
        reserved: held by torch's allocator now, so that total − free − reserved belongs to others: contexts, NCCL.
        peak: most that torch had allocated at once: weights and the activations of the largest step.
    """
    outside = total - free - reserved
    return int(utilization * total) - outside - peak
