"""Prompts that begin alike go where that beginning is cached, and load stays level: replayed on traces, beside an
oracle that sends each group of prompts to one replica, and beside replicas that take turns."""

import random
from collections import OrderedDict

import pytest

from cluster.router.prefix_index import PrefixIndex
from cluster.router.query import MAX_HASHED_BLOCKS, RoutingQuery
from cluster.router.replica_table import ReplicaTable
from cluster.router.router import default_router
from cluster.types import ReplicaInfo, ReplicaState

BLOCK_SIZE = 16
NUM_SLOTS = 64


def replica(name: str, *, running: int = 0, num_blocks: int = 4096, incarnation: int = 1) -> ReplicaInfo:
    return ReplicaInfo(
        id=name,
        model="m",
        state=ReplicaState.READY,
        address=f"{name}:1",
        incarnation=incarnation,
        max_model_len=8192,
        max_num_seqs=NUM_SLOTS,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        num_running=running,
    )


class Cache:
    """A replica's own prefix cache: the blocks of the last prompts, least recently used out first."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def take(self, hashes: list[bytes]) -> int:
        """How many blocks were there; all are afterwards."""
        hits = next((index for index, name in enumerate(hashes) if name not in self._blocks), len(hashes))
        for name in reversed(hashes):
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._num_blocks:
            self._blocks.popitem(last=False)
        return hits


def trace(seed: int, num_requests: int, num_groups: int) -> list[tuple[int, list[int]]]:
    """(group, prompt): 512 tokens that a group shares, then 128 of its own. Groups as popular as in a Zipf law."""
    chance = random.Random(seed)
    shared = [[chance.randrange(1000) for _ in range(512)] for _ in range(num_groups)]
    weights = [1 / (rank + 1) for rank in range(num_groups)]
    groups = chance.choices(range(num_groups), weights, k=num_requests)
    return [(group, shared[group] + [chance.randrange(1000) for _ in range(128)]) for group in groups]


@pytest.mark.parametrize("seed", range(3))
def test_nearly_as_many_hits_as_an_oracle_and_level_load(seed: int) -> None:
    num_replicas, num_blocks, num_running_for = 4, 1500, 24
    names = [f"r{index}" for index in range(num_replicas)]
    table = ReplicaTable()
    router = default_router(table)
    caches = {name: Cache(num_blocks) for name in names}
    oracle = [Cache(num_blocks) for _ in names]
    in_turn = [Cache(num_blocks) for _ in names]
    running: list[str] = []
    sent: OrderedDict[str, int] = OrderedDict.fromkeys(names, 0)
    hits = best = turns = 0
    for index, (group, token_ids) in enumerate(trace(seed, 2000, 48)):
        for name in names:
            table.update(replica(name, running=running.count(name), num_blocks=num_blocks))
        query = RoutingQuery(token_ids)
        chosen = router.route(query)
        hashes = query.block_hashes(BLOCK_SIZE)
        hits += caches[chosen].take(hashes)
        best += oracle[group % num_replicas].take(hashes)
        turns += in_turn[index % num_replicas].take(hashes)
        sent[chosen] += 1
        running = [*running[-num_running_for + 1 :], chosen]
    assert hits >= 0.95 * best > 0
    assert hits > 1.2 * turns
    assert max(sent.values()) <= 1.5 * sum(sent.values()) / num_replicas


def test_a_beginning_that_all_share_spreads_once_its_replica_is_busy() -> None:
    table = ReplicaTable()
    router = default_router(table)
    for name in "abcd":
        table.update(replica(name))
    shared = list(range(640))
    chosen = [router.route(RoutingQuery([*shared, index])) for index in range(NUM_SLOTS * 2)]
    assert chosen[:8] == ["a"] * 8
    assert {chosen.count(name) for name in "abcd"} == {NUM_SLOTS // 2}


def test_other_adapters_and_salts_share_nothing() -> None:
    index = PrefixIndex()
    token_ids = list(range(64))
    index.note_sent(replica("a"), RoutingQuery(token_ids).block_hashes(BLOCK_SIZE))
    for query, expected in [
        (RoutingQuery(token_ids), 4),
        (RoutingQuery([*token_ids[:40], 0, *token_ids[41:]]), 2),
        (RoutingQuery(token_ids, adapter="x"), 0),
        (RoutingQuery(token_ids, cache_salt="x"), 0),
    ]:
        assert index.num_cached(replica("a"), query.block_hashes(BLOCK_SIZE)) == expected
    assert index.num_cached(replica("b"), RoutingQuery(token_ids).block_hashes(BLOCK_SIZE)) == 0


def test_a_leaders_successor_begins_with_nothing() -> None:
    index = PrefixIndex()
    hashes = RoutingQuery(list(range(64))).block_hashes(BLOCK_SIZE)
    index.note_sent(replica("a"), hashes)
    assert index.num_cached(replica("a", incarnation=2), hashes) == 0
    index.note_sent(replica("a", incarnation=2), hashes[:1])
    assert index.num_cached(replica("a", incarnation=2), hashes) == 1


def test_no_more_blocks_than_the_replica_has_and_the_beginning_stays_longest() -> None:
    index = PrefixIndex()
    small = replica("a", num_blocks=3)
    hashes = RoutingQuery(list(range(80))).block_hashes(BLOCK_SIZE)
    index.note_sent(small, hashes)
    assert index.num_cached(small, hashes) == 3


def test_only_the_beginning_of_very_long_prompts_is_hashed() -> None:
    query = RoutingQuery(range((MAX_HASHED_BLOCKS + 10) * BLOCK_SIZE))
    assert len(query.block_hashes(BLOCK_SIZE)) == MAX_HASHED_BLOCKS
