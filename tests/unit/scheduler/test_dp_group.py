"""A request goes to the dp group that holds its beginning, unless that group is busier by far."""

from collections import defaultdict

import pytest

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.null import NullExecutor
from engine.request import Request, SamplingParams
from engine.scheduler.dp_group import choose_group


@pytest.mark.parametrize(
    ("loads", "shares", "chosen"),
    [
        ([0, 0], [0.0, 0.0], 0),
        ([1, 0], [0.0, 0.0], 1),
        ([1, 0], [0.9, 0.0], 0),
        ([8, 0], [0.9, 0.0], 0),
        ([32, 0], [1.0, 0.0], 1),
        ([3, 3, 3], [0.0, 0.5, 0.9], 2),
    ],
)
def test_load_against_what_is_cached(loads: list[int], shares: list[float], chosen: int) -> None:
    assert choose_group(loads, shares, 64) == chosen


def test_conversations_stay_where_they_began() -> None:
    engine = Engine(
        executor=NullExecutor(1),
        kv_groups=(KvGroupConfig(layers=(0,)),),
        num_dp_groups=3,
        vocab_size=100,
        scheduler_config=SchedulerConfig(16, 256, 512),
        cache_config=CacheConfig(4, 400),
    )
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for turn in range(4):
        for talk in [4, 1, 0, 5, 3, 2] if turn % 2 else range(6):
            prompt = [(talk * 7 + position) % 100 for position in range(40 + 8 * turn)]
            engine.add(Request(f"{talk}-{turn}", prompt, len(prompt), SamplingParams(2)))
            groups[talk].append(engine._states[f"{talk}-{turn}"].dp_group)
        while engine.has_work:
            engine.step(lambda: None)
    assert sorted(found[0] for found in groups.values()) == [0, 0, 1, 1, 2, 2]
    assert all(len(set(found)) == 1 for found in groups.values()), groups
