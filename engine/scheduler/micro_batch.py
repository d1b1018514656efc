"""How the work of a pipeline is divided among its plans in flight, so that every stage always has one to compute."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from engine.config import SchedulerConfig
from engine.scheduler.request_state import RequestState

_ROUNDS = 2
"""In how many rounds of plans all prompts' tokens would be computed: the first chunk is what later stages wait for."""
_LEAST_CHUNK = 64
_LEAST_PART = 16
"""Chunks under so many tokens, or under this part of the largest step, take hardly less time each."""


@dataclass(frozen=True)
class Work:
    """Of one dp group: requests that decode (``num_ready`` of them not in a plan in flight), and tokens of prompts,
    running or waiting, that no plan has yet. ``num_plans`` may be in flight, each with ``max_num_tokens`` at most."""

    num_decoding: int
    num_ready: int
    num_prompt_tokens: int
    num_plans: int
    max_num_tokens: int

    @classmethod
    def of(cls, running: Iterable[RequestState], waiting: Iterable[RequestState], config: SchedulerConfig) -> Self:
        num_decoding = num_ready = num_prompt_tokens = 0
        for state in running:
            num_known = len(state.token_ids) + state.num_pending
            is_ready = not state.num_pending and num_known - state.num_computed == 1
            num_ready += is_ready
            if is_ready or state.num_pending:
                num_decoding += num_known < state.max_num_tokens
            else:
                num_prompt_tokens += num_known - state.num_computed
        for state in waiting:
            if num_prompt_tokens >= _ROUNDS * config.depth * config.max_num_batched_tokens:
                break  # more changes nothing
            num_prompt_tokens += len(state.token_ids)
        return cls(num_decoding, num_ready, num_prompt_tokens, config.depth, config.max_num_batched_tokens)

    def max_decodes(self, num_in_flight: int) -> int:
        """Most requests that should decode in the next plan: an equal share of all, and of those that are ready.

        Requests in flight come back with their plan, so equal plans stay equal, and unequal ones become so.
        """
        num_free_plans = max(1, self.num_plans - num_in_flight)
        return min(-(-self.num_decoding // self.num_plans), -(-self.num_ready // num_free_plans))

    @property
    def max_prompt_tokens(self) -> int:
        """Most prompt tokens of the next plan: a share of all that wait, as gLLM's token throttling does it
        (arXiv 2504.14775)."""
        least = max(_LEAST_CHUNK, self.max_num_tokens // _LEAST_PART)
        return max(least, -(-self.num_prompt_tokens // (_ROUNDS * self.num_plans)))
