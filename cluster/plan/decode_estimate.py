"""How many tokens a layout decodes in a second, from the bytes that its ranks read and what crosses hosts. Pure.

A rank reads its dense weights, of its experts those that the step's tokens are sent to, and the keys and values of its
requests, at the device's memory rate. What crosses hosts waits and travels as in cluster.plan.link_cost. Products, and
collectives within a host, are not counted.
"""

import math

from cluster.plan.dispatch import DecodeEstimate, DecodeLoad
from cluster.plan.layout_plan import LayoutPlan
from cluster.plan.layouts import num_crossings, ranks_beside
from cluster.plan.link_cost import Link, expert_exchange_traffic, pipeline_traffic, tensor_parallel_traffic
from cluster.plan.rank_memory import RankMemory
from engine.config import Dtype
from engine.model_config import ModelConfig


def estimate_decode(
    config: ModelConfig, plan: LayoutPlan, load: DecodeLoad, dtype: Dtype, block_size: int, link: Link | None
) -> DecodeEstimate:
    """``link``: of every two hosts; None: what crosses them costs nothing. A plan that does not fit decodes nothing."""
    held = plan.num_held(load.context_len, block_size) if plan.fits else 0
    num_requests = min(load.num_requests, held)
    speed = (
        _tokens_per_s(config, plan, num_requests, load.context_len, dtype, block_size, link) if num_requests else 0.0
    )
    return DecodeEstimate(plan.layout, plan.kv_tokens, num_requests, speed)


def _tokens_per_s(
    config: ModelConfig,
    plan: LayoutPlan,
    num_requests: int,
    context_len: int,
    dtype: Dtype,
    block_size: int,
    link: Link | None,
) -> float:
    pp = plan.layout.pp
    # Each stage has a micro-batch of its own.
    num_batches = min(pp, num_requests)
    batch = num_requests / num_batches
    most_bytes = max(_bytes_read(config, plan, rank, batch, context_len, block_size) for rank in plan.ranks)
    stage_s, stages_link_s = most_bytes / plan.machines.device.bytes_per_s, 0.0
    if link is not None:
        stage_s += _collectives_s(config, plan, batch, dtype, link) / pp
        if crossings := num_crossings(plan.layout, plan.machines):
            stages_link_s = pipeline_traffic(config, crossings, math.ceil(batch), dtype.num_bytes).seconds(link)
    # A micro-batch comes round, or the others have each had a stage, whichever is later.
    return batch / max(stage_s, (pp * stage_s + stages_link_s) / num_batches)


def _bytes_read(
    config: ModelConfig, plan: LayoutPlan, rank: RankMemory, batch: float, context_len: int, block_size: int
) -> float:
    """By one rank in one step of ``batch`` requests, which are divided over the dp groups."""
    experts = rank.weights.get("experts", 0)
    # Of the embedding a step reads some rows only, unless it is the head as well.
    rows_only = 0 if config.tie_word_embeddings else rank.weights.get("embedding", 0)
    positions = sum(min(context_len, group.chunk_size or group.window_size or context_len) for group in rank.groups)
    cache = batch / plan.layout.dp * positions * rank.block_bytes / block_size
    return rank.weight_bytes - rows_only - experts + experts * _share_used(config, batch) + cache


def _share_used(config: ModelConfig, batch: float) -> float:
    """Of the experts: those that any of ``batch`` tokens is sent to, routing being even."""
    moe = next((layer.moe for layer in config.layers if layer.moe), None)
    return 1 - (1 - moe.num_experts_per_token / moe.num_experts) ** batch if moe else 0.0


def _collectives_s(config: ModelConfig, plan: LayoutPlan, batch: float, dtype: Dtype, link: Link) -> float:
    """In all layers, between hosts."""
    layout, per_host = plan.layout, plan.machines.per_host
    seconds = 0.0
    if layout.tp > per_host:
        num_rows = math.ceil(batch / layout.dp)
        seconds += tensor_parallel_traffic(config, layout.tp, per_host, num_rows, dtype.num_bytes).seconds(link)
    if layout.exchanges_tokens and (beside := ranks_beside(layout, plan.machines)):
        stage_size, num_tokens = layout.dp * layout.tp, math.ceil(batch)
        seconds += expert_exchange_traffic(config, stage_size, beside, num_tokens, dtype.num_bytes).seconds(link)
    return seconds
