"""Limits in memory and in Redis: the same answers; many at once take no more than there is; Redis may be away."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from cluster.tenants.config import Policies, TenantPolicy
from cluster.tenants.fallback_store import RETRY_S, FallbackStore
from cluster.tenants.limiter import Limiter, LimitExceeded, Visit
from cluster.tenants.memory_store import MemoryStore
from cluster.tenants.redis_store import TIMEOUT_S, RedisStore, connect
from cluster.tenants.report import LimitReport
from cluster.tenants.store import LimitStore, StoreUnavailable
from cluster.tenants.tenancy import Tenancy, TenancyConfig
from engine.errors import InvalidOption
from tests.tenants.redis_server import PASSWORD, RedisServer


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, redis: Redis) -> AsyncIterator[LimitStore]:
    yield MemoryStore(time.monotonic) if request.param == "memory" else RedisStore(redis)


async def test_a_bucket_is_taken_from_as_far_as_it_goes(store: LimitStore) -> None:
    first = await store.take("a", "tokens", 1000, 700)
    assert (first.wait_s, first.remaining) == (0.0, 300)
    assert first.reset_s == pytest.approx(42.0, abs=0.5)
    refused = await store.take("a", "tokens", 1000, 600)
    assert refused.wait_s == pytest.approx(18.0, abs=0.5) and 300 <= refused.remaining <= 310
    assert (await store.take("a", "requests", 1000, 600)).wait_s == 0.0, "another bucket"
    assert (await store.take("b {}:", "tokens", 1000, 600)).wait_s == 0.0, "another tenant's"
    await store.give("a", "tokens", 1000, 500)
    assert (await store.take("a", "tokens", 1000, 600)).wait_s == 0.0
    await store.give("a", "tokens", 1000, -5000)
    assert (await store.take("a", "tokens", 1000, 1)).wait_s > 200, "a debt"
    await store.give("a", "tokens", 1000, 10**6)
    assert (await store.take("a", "tokens", 1000, 0)).remaining == 1000, "never more than it holds"


async def test_another_bound_holds_at_once(store: LimitStore) -> None:
    await store.take("a", "requests", 10, 10)
    assert (await store.take("a", "requests", 10, 1)).wait_s > 0
    assert (await store.take("a", "requests", 20, 5)).remaining == 5
    assert (await store.take("a", "requests", 10, 1)).wait_s > 0


async def test_hundreds_at_once_take_no_more_than_there_is(store: LimitStore) -> None:
    began_s = time.monotonic()
    levels = await asyncio.gather(*(store.take("a", "requests", 50, 1) for _ in range(300)))
    num_new = int((time.monotonic() - began_s) * 50 / 60) + 1
    assert 50 <= sum(level.wait_s == 0.0 for level in levels) <= 50 + num_new


async def test_as_many_run_as_may(store: LimitStore) -> None:
    entered = await asyncio.gather(*(store.enter("a", f"r{number}", 3) for number in range(20)))
    assert sum(entered) == 3
    await store.leave("a", f"r{entered.index(True)}")
    assert await store.enter("a", "later", 3) and not await store.enter("a", "last", 3)
    assert await store.enter("b", "other", 1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 400), st.booleans()), min_size=1, max_size=25))
async def test_redis_counts_as_memory_does(redis: Redis, steps: list[tuple[int, bool]]) -> None:
    await redis.flushall()
    theirs, ours = RedisStore(redis), MemoryStore(time.monotonic)
    for amount, gives in steps:
        if gives:
            await theirs.give("a", "tokens", 600, amount)
            await ours.give("a", "tokens", 600, amount)
            continue
        one, other = await theirs.take("a", "tokens", 600, amount), await ours.take("a", "tokens", 600, amount)
        if abs(one.remaining - amount) > 3 and max(one.wait_s, other.wait_s) > 0.5:
            assert one.wait_s == pytest.approx(other.wait_s, abs=0.5)


async def test_what_a_lost_front_end_had_running_is_free_after_its_lease(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.tenants.redis_store.LEASE_S", 0.15)
    store = RedisStore(redis)
    assert await store.enter("a", "renewed", 2) and await store.enter("a", "lost", 2)
    for _ in range(5):
        await asyncio.sleep(0.05)
        await store.renew("a", ["renewed"])
    assert await store.enter("a", "new", 2)
    assert not await store.enter("a", "one more", 2), "what was renewed still runs"


def visit(name: str) -> Visit:
    return Visit(name, LimitReport(), num_used=lambda: 0)


def policies(**policy: int) -> Policies:
    return Policies(TenantPolicy(), {"a": TenantPolicy.model_validate(policy)})


async def test_what_runs_counts_again_when_redis_is_back(redis_server: RedisServer) -> None:
    """Also what it had lost, and what entered while it was away."""
    now_s = 0.0
    async with AsyncExitStack() as stack:
        limiters: list[Limiter] = []
        for _ in range(2):
            client = connect(redis_server.url, PASSWORD, timeout_s=20.0)
            stack.push_async_callback(client.aclose)
            store = FallbackStore(RedisStore(client), MemoryStore(lambda: now_s), lambda: now_s, lambda: None)
            limiters.append(Limiter(lambda: policies(max_concurrent_requests=2), store))
        one, two = limiters
        async with AsyncExitStack() as running:
            await running.enter_async_context(one.stay("a", visit("before")))
            redis_server.stop()
            await running.enter_async_context(one.stay("a", visit("meanwhile")))
            redis_server.start()
            now_s += RETRY_S
            await one.renew()
            with pytest.raises(LimitExceeded, match="2 requests running"):
                async with two.stay("a", visit("elsewhere")):
                    pytest.fail("two run")
        async with two.stay("a", visit("after")), two.stay("a", visit("too")):
            pass


async def test_what_leaves_while_it_is_renewed_does_not_run(redis: Redis) -> None:
    class Slow(RedisStore):
        has_begun, may_go_on = asyncio.Event(), asyncio.Event()

        async def renew(self, tenant: str, request_ids: list[str]) -> None:
            self.has_begun.set()
            await self.may_go_on.wait()
            await super().renew(tenant, request_ids)

    store = Slow(redis)
    limiter = Limiter(lambda: policies(max_concurrent_requests=1), store)
    async with limiter.stay("a", visit("r")):
        renewing = asyncio.create_task(limiter.renew())
        await store.has_begun.wait()
    store.may_go_on.set()
    await renewing
    async with limiter.stay("a", visit("next")):
        pass


async def test_buckets_do_not_stay_for_ever(redis: Redis) -> None:
    await RedisStore(redis).take("a", "tokens", 600, 300)
    assert 60 < await redis.ttl("remuda:limit:{a}:tokens") <= 91


async def test_a_wrong_password_is_an_absent_store(shared_redis: RedisServer) -> None:
    client = connect(shared_redis.url, "wrong")
    with pytest.raises(StoreUnavailable):
        await RedisStore(client).take("a", "tokens", 1, 1)
    await client.aclose()


async def test_local_limits_hold_while_redis_is_away(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Fail open, to local limits: nobody is refused for it, nobody is unlimited, and it is said once."""
    now_s, failures = 0.0, 0

    def fail() -> None:
        nonlocal failures
        failures += 1

    client = connect(redis_server.url, PASSWORD)
    store = FallbackStore(RedisStore(client), MemoryStore(lambda: now_s), lambda: now_s, fail)
    assert (await store.take("a", "requests", 5, 5)).wait_s == 0.0
    assert (await store.take("a", "requests", 5, 1)).wait_s > 0.0
    redis_server.stop()
    answers = [(await store.take("a", "requests", 5, 1)).wait_s == 0.0 for _ in range(8)]
    assert answers == [True] * 5 + [False] * 3
    was_shared = store.is_shared
    assert failures == 1 and not was_shared, "and it is not asked again for each request"
    now_s += RETRY_S
    await store.take("a", "requests", 5, 1)
    assert failures == 2
    redis_server.start()
    now_s += RETRY_S
    assert (await store.take("a", "requests", 5, 5)).wait_s == 0.0 and store.is_shared, "the new Redis's bucket"
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "the limits' store is away",
        "the limits' store is back",
    ]
    await client.aclose()


async def test_a_redis_that_hangs_holds_up_nobody_for_long(redis_server: RedisServer) -> None:
    client = connect(redis_server.url, PASSWORD)
    store = FallbackStore(RedisStore(client), MemoryStore(time.monotonic), time.monotonic, lambda: None)
    await store.take("a", "requests", 100, 1)
    redis_server.freeze(True)
    try:
        began_s = time.monotonic()
        for _ in range(20):
            await store.take("a", "requests", 100, 1)
        assert time.monotonic() - began_s < 4 * TIMEOUT_S
    finally:
        redis_server.freeze(False)
    await client.aclose()


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidOption) as caught:
        Tenancy(TenancyConfig(limits_store="redis://:hidden@127.0.0.1/0"))
    assert "hidden" not in str(caught.value)
    with pytest.raises(InvalidOption, match="write redis://HOST:PORT/NUMBER"):
        Tenancy(TenancyConfig(limits_store="127.0.0.1:6379"))
