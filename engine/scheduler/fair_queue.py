"""The requests of one dp group that wait, in the order in which they are served.

Between tenants by virtual token counters (VTC, arXiv 2401.00588): the tenant that has been served the least, for its
weight, goes first; one that had nothing waiting starts no lower than those that had, so nobody saves up. Tenants of a
better priority go before all others, but for one admission in ``PLACES_PER_PRIORITY``, so that nobody starves. Among
its own requests a tenant is served by their place (engine.scheduler.policy). Pure; O(log n) an admission.

Each dp group keeps counters of its own, from the beginning of an epoch: requests are spread over groups and replicas by
their load, and a tenant gets its share in each.
"""

import heapq
from collections.abc import Iterator

from engine.request import Tenant
from engine.scheduler.account import Account
from engine.scheduler.policy import PLACES_PER_PRIORITY, place
from engine.scheduler.request_state import RequestState

MAX_IDLE_ACCOUNTS = 1024
"""Of tenants that have no request. Of more, those that were served least are forgotten: they lose nothing but the
memory of what they would hardly have had to wait for."""


class Level:
    """The tenants of one priority that wait.

    ``last_pick``: the last admission of one of them; ``last_left``: whose requests were the last to be all admitted.
    """

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.last_pick = 0
        self.last_left: Account | None = None
        self.num_accounts = 0
        self._heap: list[tuple[float, int, int, Account]] = []
        self._num_entries = 0

    @property
    def due(self) -> tuple[int, int]:
        return (self.last_pick + PLACES_PER_PRIORITY * self.priority, self.priority)

    def enter(self, account: Account) -> None:
        """It has something waiting, from now on."""
        lowest = self.first() if self.num_accounts else self.last_left
        if lowest is not None:
            account.served = max(account.served, lowest.served)
        self.num_accounts += 1
        self._num_entries += 1
        account.entry = self._num_entries
        heapq.heappush(self._heap, (account.served, account.last_pick, account.entry, account))

    def leave(self, account: Account) -> None:
        self.num_accounts -= 1
        account.entry = 0
        self.last_left = account

    def first(self) -> Account:
        """Of those that wait (at least one). Counters only grow, so an entry that is out of date is too far ahead, and
        is put right when it comes to the top."""
        while True:
            served, last_pick, entry, account = self._heap[0]
            if account.entry != entry:
                heapq.heappop(self._heap)
            elif (served, last_pick) != (account.served, account.last_pick):
                heapq.heapreplace(self._heap, (account.served, account.last_pick, entry, account))
            else:
                return account


class FairQueue:
    """Knows each request from ``add`` to ``remove``, while it waits and while it runs."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, int], Account] = {}
        self._live: dict[Account, None] = {}
        """Those with a request."""
        self._busy: dict[Account, None] = {}
        """Those of them with one that runs."""
        self._levels: dict[int, Level] = {}
        self._num_waiting = 0
        self._num_picks = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._num_waiting

    def __iter__(self) -> Iterator[RequestState]:
        """Those that wait, in no order."""
        return (state for account in self._live for _, _, state in account.waiting if state.is_queued)

    @property
    def live_accounts(self) -> list[Account]:
        """Of tenants with requests, waiting or running."""
        return list(self._live)

    @property
    def is_shared(self) -> bool:
        """Whether more than one tenant has requests."""
        return len(self._live) > 1

    def add(self, state: RequestState) -> None:
        """A new request; or one of an earlier epoch, which does not pay again for what it has paid."""
        self.settle()
        account = state.account = self._account_of(state.tenant)
        account.weight = state.tenant.weight
        self._live[account] = None
        self._put(state)

    def _account_of(self, tenant: Tenant) -> Account:
        key = (tenant.name, tenant.priority)
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) - len(self._live) >= MAX_IDLE_ACCOUNTS:
                self._forget_idle()
            account = self._accounts[key] = Account(tenant.name, tenant.priority)
        return account

    def _forget_idle(self) -> None:
        """The half of them that was served least."""
        idle = sorted((item for item in self._accounts.items() if not item[1].is_live), key=lambda item: item[1].served)
        for key, _ in idle[: len(idle) // 2]:
            del self._accounts[key]

    def put_back(self, state: RequestState) -> None:
        """It ran, and waits again."""
        state.timeline.note("preempted")
        state.account.charge_outputs(state)
        self._stop(state)
        self._put(state)

    def _put(self, state: RequestState) -> None:
        account = state.account
        heapq.heappush(account.waiting, (*place(state), state))
        state.is_queued = True
        account.num_waiting += 1
        self._num_waiting += 1
        if account.entry:
            return
        level = self._levels.setdefault(account.priority, Level(account.priority))
        if not level.num_accounts:
            level.last_pick = self._num_picks
        level.enter(account)

    def first(self) -> RequestState | None:
        """Who is to be admitted next."""
        levels = [level for level in self._levels.values() if level.num_accounts]
        if not levels:
            return None
        waiting = min(levels, key=lambda level: level.due).first().waiting
        while not waiting[0][2].is_queued:
            heapq.heappop(waiting)
        return waiting[0][2]

    def take(self) -> RequestState:
        """Admits ``first``, which there must be."""
        state = self.first()
        assert state is not None
        account = state.account
        heapq.heappop(account.waiting)
        self._num_picks += 1
        account.last_pick = self._levels[account.priority].last_pick = self._num_picks
        self._unqueue(state)
        account.running[state] = None
        self._busy[account] = None
        return state

    def remove(self, state: RequestState) -> None:
        """It has ended, waiting or running."""
        account = state.account
        account.charge_outputs(state)
        if state.is_queued:
            self._unqueue(state)
            if len(account.waiting) > 2 * account.num_waiting + 16:
                account.waiting = [entry for entry in account.waiting if entry[2].is_queued]
                heapq.heapify(account.waiting)
        else:
            self._stop(state)
        if not account.is_live:
            account.waiting.clear()
            del self._live[account]

    def _unqueue(self, state: RequestState) -> None:
        account = state.account
        state.is_queued = False
        account.num_waiting -= 1
        self._num_waiting -= 1
        if not account.num_waiting:
            self._levels[account.priority].leave(account)

    def _stop(self, state: RequestState) -> None:
        account = state.account
        del account.running[state]
        if not account.running:
            del self._busy[account]

    def settle(self) -> None:
        """Charges what was generated since; needed before an order is asked for. With one tenant it can wait."""
        if self.is_shared:
            for account in self._busy:
                for state in account.running:
                    account.charge_outputs(state)

    def goes_before(self, one: RequestState, other: RequestState) -> bool:
        """Whether ``one`` is served first, wherever they are, waiting or running."""
        mine, its = one.account, other.account
        if mine is its:
            return place(one) < place(other)
        if mine.priority != its.priority:
            return self._levels[mine.priority].due < self._levels[its.priority].due
        return (mine.served, mine.last_pick, mine.name) < (its.served, its.last_pick, its.name)
