"""Which running request goes back to the queue so that another tenant need not wait for its end. Pure.

Counters decide who is admitted next, but not when a place becomes free: a tenant whose long requests have all slots, or
all blocks, would keep them. So the tenant that is first in the queue may have what is its share by weight, of slots and
of cached tokens, from tenants that have more than theirs. Nobody is brought below its share, or below one request,
so two tenants never take turns in driving each other out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.scheduler.account import Account
from engine.scheduler.policy import victim_of
from engine.scheduler.request_state import RequestState


@dataclass(frozen=True)
class Needs:
    """What the first in the queue waits for. ``num_slots``: those that there are."""

    slot: bool
    blocks: bool
    num_slots: int


def who_makes_way(first: RequestState, accounts: Sequence[Account], needs: Needs) -> RequestState | None:
    """``accounts``: of all tenants with requests. None: nobody, or nothing is needed."""
    if needs.slot:
        return _for_slot(first, accounts, needs.num_slots)
    return _for_blocks(first, accounts) if needs.blocks else None


def _for_slot(first: RequestState, accounts: Sequence[Account], num_slots: int) -> RequestState | None:
    slots_per_weight = num_slots / sum(account.weight for account in accounts)

    def due(account: Account) -> float:
        return max(1.0, slots_per_weight * account.weight)

    mine = first.account
    if len(mine.running) + 1 > due(mine):
        return None
    return _from_richest(
        [account for account in _others(mine, accounts) if len(account.running) - 1 >= due(account)],
        lambda account: len(account.running),
    )


def _for_blocks(first: RequestState, accounts: Sequence[Account]) -> RequestState | None:
    held = {account: sum(state.num_block_tokens for state in account.running) for account in accounts}
    num_needed = len(first.token_ids)
    tokens_per_weight = (sum(held.values()) + num_needed) / sum(account.weight for account in accounts)
    mine = first.account
    if held[mine] + num_needed > tokens_per_weight * mine.weight:
        return None
    return _from_richest(
        [
            account
            for account in _others(mine, accounts)
            if len(account.running) > 1 and held[account] > tokens_per_weight * account.weight
        ],
        held.__getitem__,
    )


def num_owed(first: RequestState, accounts: Sequence[Account], num_needed: Callable[[int], int]) -> int:
    """Blocks that prompts of other tenants, which run already, have yet to take: who is admitted beside them must not
    take these, or tenants would have each other computed again. ``num_needed``: blocks of so many positions."""
    return sum(
        max(0, num_needed(len(state.token_ids)) - num_needed(state.num_block_tokens))
        for account in accounts
        if account is not first.account
        for state in account.running
        if state.num_block_tokens < len(state.token_ids)
    )


def _others(mine: Account, accounts: Sequence[Account]) -> list[Account]:
    """Those that this tenant may take from: of no better priority."""
    return [account for account in accounts if account is not mine and account.priority >= mine.priority]


def _from_richest(accounts: Sequence[Account], held: Callable[[Account], int]) -> RequestState | None:
    if not accounts:
        return None
    return victim_of(max(accounts, key=lambda account: held(account) / account.weight).running)
