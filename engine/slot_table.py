"""What a rank knows of the requests it computes: the rank's half of the step protocol (docs/step_protocol.md).

Knows no tensors. The model runner turns what ``apply`` returns into the tensors of a forward pass; tests use it as a
model of a rank. Everything that the protocol forbids raises ProtocolViolation here, before any memory is touched.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.config import KvGroupConfig
from engine.errors import ProtocolViolation
from engine.kv_groups import first_visible_block
from engine.messages import (
    NO_ADAPTER,
    NO_STEP,
    NULL_BLOCK,
    BatchPlan,
    LoadAdapter,
    NewRequest,
    ScheduledRequest,
    StepPlan,
)
from engine.packed import unpack
from engine.request import SamplingParams

UNREAD = -1
"""In a history: a token that was sampled on this rank's device and has not been read from there."""


@dataclass(slots=True)
class SlotState:
    """One request, as a rank sees it.

    ``token_ids``: prompt and what was generated, as far as this rank knows it (see UNREAD). ``block_tables[g][i]``: the
    block with the keys and values of positions i × block_size … of KV group g; NULL_BLOCK where they can no longer be
    seen. Tables are arrays of int64, so that a step copies a long one in one go.
    ``num_computed``: positions whose keys and values have been computed, this step's included once it was applied.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_tables: list["array[int]"]
    num_unseen_blocks: list[int]
    num_computed: int = 0
    sample_step: int = NO_STEP
    """The last step after which this slot's next token was wanted."""
    sample_known: bool = False
    """Whether this rank has that token (``record_sample``)."""
    adapter: int = NO_ADAPTER
    """The slot of its LoRA adapter."""

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class UnreadSample(NamedTuple):
    """The place in a slot's history of a token that was sampled and has not been read. The slot may hold another
    request meanwhile."""

    state: SlotState
    place: int

    def fill(self, token_id: int) -> None:
        assert self.state.token_ids[self.place] == UNREAD
        self.state.token_ids[self.place] = token_id


class ScheduledSlot(NamedTuple):
    """One slot's share of a step. ``state`` is the table's own object: read it, do not keep it beyond the step.

    ``sample``: a next token is wanted.
    """

    slot: int
    state: SlotState
    start: int
    num_tokens: int
    sample: bool

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        return self.state.token_ids[self.start : self.start + self.num_tokens]

    @property
    def embeds(self) -> bool:
        """The prompt ends here, and its embedding is wanted."""
        is_last = self.start + self.num_tokens == self.state.num_prompt_tokens
        return is_last and self.state.sampling.pooling is not None


class SlotTable:
    """The slots of one rank, in one epoch.

    Args:
        num_slots: slots are 0 … num_slots − 1.
        kv_groups: the model's KV groups, in the order of ``ScheduledRequest.new_block_ids``.
        block_size: tokens per block.
        num_blocks: block ids are 1 … num_blocks − 1.
        epoch: plans of any other epoch are refused.
        dp_group: which batch of each plan is this rank's.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        kv_groups: Sequence[KvGroupConfig],
        block_size: int,
        num_blocks: int,
        epoch: int,
        dp_group: int = 0,
    ) -> None:
        self._slots: list[SlotState | None] = [None] * num_slots
        self._kv_groups = tuple(kv_groups)
        self._narrow_groups = [(g, group) for g, group in enumerate(kv_groups) if not group.is_full]
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._epoch = epoch
        self._dp_group = dp_group
        self._next_step = 0
        self._adapters: set[int] = set()

    def apply(self, plan: StepPlan) -> list[ScheduledSlot]:
        """Takes over one plan and returns what is to be computed, in the plan's order.

        Raises ProtocolViolation where the plan is of another epoch or out of order, names an unknown slot, leaves a
        gap in a request's positions or its block table, refers to a sample that this rank does not have, or leaves a
        request with an adapter that is not loaded.
        """
        if plan.epoch != self._epoch:
            raise ProtocolViolation(f"plan of epoch {plan.epoch} reached a rank of epoch {self._epoch}")
        if plan.step != self._next_step:
            raise ProtocolViolation(f"plan of step {plan.step} where step {self._next_step} was due")
        if self._dp_group >= len(plan.batches):
            raise ProtocolViolation(
                f"step {plan.step} has {len(plan.batches)} batches, none for dp group {self._dp_group}"
            )
        self._next_step += 1
        batch = plan.batches[self._dp_group]
        self._remove(plan.step, batch)
        if plan.adapters:
            self._change_adapters(plan)
        for request in batch.new:
            self._add(plan.step, request)
        scheduled = [self._advance(plan.step, self._next_token(slot)) for slot in unpack(batch.decodes)]
        scheduled += [self._advance(plan.step, share) for share in batch.scheduled]
        if len({share.slot for share in scheduled}) != len(scheduled):
            raise ProtocolViolation(f"step {plan.step} schedules a slot twice")
        return scheduled

    def record_sample(self, step: int, slot: int, token_id: int) -> None:
        """Keeps the token sampled for ``slot`` after ``step``, so that later plans can refer to it.

        Every rank must be told where plans may be in flight (depth above 1); otherwise the leader sends the value. A
        rank that reports a SlotError records any token, so that plans already in flight can still be computed.
        """
        state = self.state(slot)
        if state.sample_step != step or state.sample_known:
            raise ProtocolViolation(f"no token of slot {slot} was wanted after step {step}")
        state.token_ids.append(token_id)
        state.sample_known = True

    def record_unread(self, step: int, slot: int) -> UnreadSample:
        """As ``record_sample``, of a token that is on the device alone. Until it is filled in, no plan may come that
        names values behind it."""
        self.record_sample(step, slot, UNREAD)
        state = self.state(slot)
        return UnreadSample(state, len(state.token_ids) - 1)

    def state(self, slot: int) -> SlotState:
        """Raises ProtocolViolation where the slot holds no request."""
        state = self._slots[slot] if 0 <= slot < len(self._slots) else None
        if state is None:
            raise ProtocolViolation(f"slot {slot} holds no request (slots are 0 to {len(self._slots) - 1})")
        return state

    @property
    def num_live(self) -> int:
        """Slots that hold a request."""
        return sum(state is not None for state in self._slots)

    def _remove(self, step: int, batch: BatchPlan) -> None:
        for slot in batch.removed:
            if not 0 <= slot < len(self._slots) or self._slots[slot] is None:
                raise ProtocolViolation(f"step {step} removes slot {slot}, which holds no request")
            self._slots[slot] = None

    def _change_adapters(self, plan: StepPlan) -> None:
        for change in plan.adapters:
            is_load = isinstance(change, LoadAdapter)
            if change.slot < 0 or is_load == (change.slot in self._adapters):
                raise ProtocolViolation(
                    f"step {plan.step} {'loads' if is_load else 'unloads'} adapter slot {change.slot}; loaded are "
                    f"{sorted(self._adapters)}"
                )
            self._adapters ^= {change.slot}
        for slot, state in enumerate(self._slots):
            if state is not None and state.adapter not in self._adapters | {NO_ADAPTER}:
                raise ProtocolViolation(f"step {plan.step} unloads adapter slot {state.adapter}, which slot {slot} has")

    def _add(self, step: int, request: NewRequest) -> None:
        if not 0 <= request.slot < len(self._slots):
            raise ProtocolViolation(f"step {step} uses slot {request.slot}; slots are 0 to {len(self._slots) - 1}")
        if self._slots[request.slot] is not None:
            raise ProtocolViolation(f"step {step} gives slot {request.slot} away, which was not removed")
        if not 0 < request.num_prompt_tokens <= len(request.token_ids):
            raise ProtocolViolation(
                f"slot {request.slot}: {request.num_prompt_tokens} prompt tokens of {len(request.token_ids)} tokens"
            )
        if request.adapter not in self._adapters | {NO_ADAPTER}:
            raise ProtocolViolation(f"slot {request.slot}: adapter slot {request.adapter} is not loaded")
        num_shared = self._num_shared_tokens(request)
        self._slots[request.slot] = SlotState(
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            block_tables=[array("q", ids) for ids in request.block_ids] or [array("q") for _ in self._kv_groups],
            num_unseen_blocks=[0] * len(self._kv_groups),
            num_computed=num_shared,
            adapter=request.adapter,
        )

    def _num_shared_tokens(self, request: NewRequest) -> int:
        """How many leading tokens the blocks hold that the request begins with."""
        if not request.block_ids:
            return 0
        lengths = {len(table) for table in request.block_ids}
        num_tokens = min(lengths) * self._block_size
        if len(request.block_ids) != len(self._kv_groups) or len(lengths) > 1 or num_tokens >= len(request.token_ids):
            raise ProtocolViolation(
                f"slot {request.slot}: begins with {[len(table) for table in request.block_ids]} blocks of "
                f"{self._block_size} tokens, of {len(request.token_ids)} tokens in {len(self._kv_groups)} KV groups"
            )
        for group, table in zip(self._kv_groups, request.block_ids, strict=True):
            first = first_visible_block(group, num_tokens, self._block_size)
            if table[:first] != [NULL_BLOCK] * first or not all(0 < b < self._num_blocks for b in table[first:]):
                raise ProtocolViolation(f"slot {request.slot}: begins with blocks {table}, of which {first} are unseen")
        return num_tokens

    def _next_token(self, slot: int) -> ScheduledRequest:
        """What a slot among a plan's ``decodes`` stands for."""
        state = self.state(slot)
        if state.sample_step == NO_STEP:
            raise ProtocolViolation(f"slot {slot} decodes, but nothing was sampled for it")
        return ScheduledRequest(slot, state.num_computed, 1, [], [], True, state.sample_step)

    def _advance(self, step: int, share: ScheduledRequest) -> ScheduledSlot:
        state = self.state(share.slot)
        end = share.start + share.num_tokens
        if share.start != state.num_computed or share.num_tokens < 1:
            raise ProtocolViolation(
                f"step {step}, slot {share.slot}: positions {share.start} to {end - 1}, but {state.num_computed} is due"
            )
        self._extend_history(step, share, state, end)
        if share.sample != (end == len(state.token_ids)):
            raise ProtocolViolation(
                f"step {step}, slot {share.slot}: sample is {share.sample} after position {end - 1} "
                f"of {len(state.token_ids)} known tokens"
            )
        self._extend_block_tables(step, share, state, end)
        state.num_computed = end
        samples = share.sample and state.sampling.pooling is None
        if samples:
            state.sample_step = step
            state.sample_known = False
        return ScheduledSlot(share.slot, state, share.start, share.num_tokens, samples)

    def _extend_history(self, step: int, share: ScheduledRequest, state: SlotState, end: int) -> None:
        known = state.token_ids
        if share.input_step != NO_STEP:
            if state.sample_step != share.input_step or not state.sample_known or end != len(known) or share.token_ids:
                raise ProtocolViolation(
                    f"step {step}, slot {share.slot}: the input refers to step {share.input_step}; "
                    f"the last sample here is of step {state.sample_step} (known: {state.sample_known})"
                )
            return
        if share.token_ids:
            first = end - len(share.token_ids)
            num_known = len(known) - first
            if num_known < 0 or known[first:end] != share.token_ids[:num_known]:
                raise ProtocolViolation(
                    f"step {step}, slot {share.slot}: token values from position {first} do not continue the "
                    f"{len(known)} tokens known here"
                )
            known.extend(share.token_ids[num_known:])
        if end > len(known):
            raise ProtocolViolation(
                f"step {step}, slot {share.slot}: no token is known at position {end - 1}, only {len(known)} before it"
            )

    def _extend_block_tables(self, step: int, share: ScheduledRequest, state: SlotState, end: int) -> None:
        if share.new_block_ids and len(share.new_block_ids) != len(self._kv_groups):
            raise ProtocolViolation(
                f"step {step}, slot {share.slot}: blocks for {len(share.new_block_ids)} KV groups of "
                f"{len(self._kv_groups)}"
            )
        for table, block_ids in zip(state.block_tables, share.new_block_ids, strict=False):
            for block_id in block_ids:
                if not NULL_BLOCK < block_id < self._num_blocks:
                    raise ProtocolViolation(
                        f"step {step}, slot {share.slot}: block {block_id}; blocks are 1 to {self._num_blocks - 1}"
                    )
            table.extend(block_ids)
        for index, table in enumerate(state.block_tables):
            if len(table) * self._block_size < end:
                raise ProtocolViolation(
                    f"step {step}, slot {share.slot}: {len(table)} blocks in KV group {index} do not hold {end} tokens"
                )
        for index, group in self._narrow_groups:
            table = state.block_tables[index]
            first = first_visible_block(group, share.start, self._block_size)
            for unseen in range(state.num_unseen_blocks[index], first):
                table[unseen] = NULL_BLOCK
            state.num_unseen_blocks[index] = first
