"""What a request meets on its way: rate, running and waiting requests, tokens reserved and given back."""

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import pytest

from cluster.errors import TakenOver
from cluster.tenants.config import Policies, TenantPolicy
from cluster.tenants.limiter import Limiter, LimitExceeded, Stay, Visit
from cluster.tenants.memory_store import MemoryStore
from cluster.tenants.report import LimitReport, duration_text
from engine.errors import InvalidRequest


class Bed:
    def __init__(self, **policy: object) -> None:
        self.now_s = 0.0
        self.store = MemoryStore(lambda: self.now_s)
        self.policies = Policies(TenantPolicy(), {"a": TenantPolicy.model_validate(policy)})
        self.limiter = Limiter(lambda: self.policies, self.store)
        self.report = LimitReport()

    def stay(
        self, name: str, num_used: int = 0, tenant: str = "a", **options: bool
    ) -> AbstractAsyncContextManager[Stay]:
        return self.limiter.stay(tenant, Visit(name, self.report, lambda: num_used, **options))

    async def tokens(self) -> int:
        return (await self.store.take("a", "tokens", 1000, 0)).remaining


async def test_tokens_are_reserved_and_what_is_left_comes_back() -> None:
    bed = Bed(tokens_per_minute=1000)
    async with bed.stay("r", num_used=130) as stay:
        await stay.reserve(100, 400, is_asked_for=True)
        assert await bed.tokens() == 500
        assert bed.report.headers() == {
            "x-ratelimit-limit-tokens": "1000",
            "x-ratelimit-remaining-tokens": "500",
            "x-ratelimit-reset-tokens": "30s",
        }
        async with bed.stay("other") as other:
            with pytest.raises(LimitExceeded, match=r"may need 600; try again in 6.0 s") as caught:
                await other.reserve(300, 300, is_asked_for=True)
            assert caught.value.retry_after_s == pytest.approx(6.0)
    assert await bed.tokens() == 870


async def test_a_request_that_fails_or_is_cancelled_gives_back_what_it_did_not_use() -> None:
    bed = Bed(tokens_per_minute=1000, max_concurrent_requests=1)
    for error in (RuntimeError, asyncio.CancelledError):
        with pytest.raises(error):
            async with bed.stay("r") as stay:
                await stay.reserve(500, 500, is_asked_for=True)
                raise error
        assert await bed.tokens() == 1000


async def test_limits_are_not_evaded_by_leaving_and_coming_back() -> None:
    bed = Bed(tokens_per_minute=1000, requests_per_minute=2, max_concurrent_requests=1)
    with pytest.raises(asyncio.CancelledError):
        async with bed.stay("r", num_used=10, may_return=True) as stay:
            await stay.reserve(100, 400, is_asked_for=True)
            raise asyncio.CancelledError
    assert await bed.tokens() == 500, "the leaders go on with it: what it may use stays taken"
    bed.now_s = 30.0
    assert await bed.tokens() == 1000
    async with bed.stay("r", num_used=500, may_return=True, comes_back=True) as stay:
        await stay.reserve(100, 400, is_asked_for=True)
        bed.now_s = 60.0
        with pytest.raises(LimitExceeded, match="1 requests running"):
            async with bed.stay("other"):
                pytest.fail("the one that came back runs")
    assert await bed.tokens() == 1000, "it has paid before"


async def test_limits_are_not_evaded_by_coming_back_while_the_first_connection_is_open() -> None:
    bed = Bed(tokens_per_minute=1000, max_concurrent_requests=1)
    async with AsyncExitStack() as stack:
        with pytest.raises(TakenOver):
            async with bed.stay("r", num_used=10, may_return=True) as first:
                await first.reserve(100, 400, is_asked_for=True)
                again = bed.stay("r", num_used=500, may_return=True, comes_back=True)
                second = await stack.enter_async_context(again)
                await second.reserve(100, 400, is_asked_for=True)
                raise TakenOver("another connection reads it")
        assert await bed.tokens() == 500, "it runs on: what it may use stays taken"
        with pytest.raises(LimitExceeded, match="1 requests running"):
            async with bed.stay("other"):
                pytest.fail("one connection less does not end it")
    assert await bed.tokens() == 500
    async with bed.stay("other"):
        pass


async def test_coming_back_is_a_request_of_the_minute() -> None:
    bed = Bed(requests_per_minute=3)
    with pytest.raises(asyncio.CancelledError):
        async with bed.stay("r", may_return=True):
            raise asyncio.CancelledError
    for _ in range(2):
        async with bed.stay("r", may_return=True, comes_back=True):
            pass
    with pytest.raises(LimitExceeded, match="3 requests a minute"):
        async with bed.stay("r", may_return=True, comes_back=True):
            pytest.fail("it is one too many")


async def test_who_comes_back_waits_for_nobody() -> None:
    bed = Bed(max_concurrent_requests=1, max_queued_requests=1)
    async with bed.stay("r", may_return=True):

        async def wait() -> None:
            async with bed.stay("waits"):
                pass

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        async with asyncio.timeout(20), bed.stay("r", may_return=True, comes_back=True):
            assert not waiting.done()
    await waiting


async def test_what_goes_beyond_the_bucket_is_owed_once_however_often_its_client_comes_back() -> None:
    bed = Bed(tokens_per_minute=1000)
    with pytest.raises(asyncio.CancelledError):
        async with bed.stay("r", num_used=1200, may_return=True) as stay:
            await stay.reserve(100, 100_000, is_asked_for=False)
            raise asyncio.CancelledError
    for num_used in (1500, 1500, 1300):
        async with bed.stay("r", num_used=num_used, may_return=True, comes_back=True) as stay:
            await stay.reserve(100, 100_000, is_asked_for=False)
    level = await bed.store.take("a", "tokens", 1000, 1)
    assert level.wait_s == pytest.approx(501 * 60 / 1000)


async def test_more_than_the_bucket_is_the_clients_fault_unless_it_named_no_length() -> None:
    bed = Bed(tokens_per_minute=1000)
    async with bed.stay("r", num_used=1500) as stay:
        with pytest.raises(InvalidRequest) as caught:
            await stay.reserve(100, 901, is_asked_for=True)
        assert caught.value.param == "max_tokens"
        with pytest.raises(InvalidRequest):
            await stay.reserve(1001, 10, is_asked_for=False)
        await stay.reserve(100, 100_000, is_asked_for=False)
        assert await bed.tokens() == 0
    level = await bed.store.take("a", "tokens", 1000, 1)
    assert level.wait_s == pytest.approx(501 * 60 / 1000), "what went beyond is owed"


async def test_requests_a_minute_count_whether_they_succeed_or_not() -> None:
    bed = Bed(requests_per_minute=2)
    for number in range(2):
        async with bed.stay(f"r{number}"):
            pass
    with pytest.raises(LimitExceeded) as caught:
        async with bed.stay("r2"):
            pytest.fail("it is one too many")
    assert caught.value.retry_after_s == pytest.approx(30.0)
    assert bed.report.headers()["x-ratelimit-remaining-requests"] == "0"
    bed.now_s = 30.0
    async with bed.stay("r3"):
        pass
    async with bed.stay("r4", tenant="b"):
        pass


async def test_those_that_wait_run_in_their_order_and_the_queue_has_an_end() -> None:
    bed = Bed(max_concurrent_requests=2, max_queued_requests=3)
    order: list[str] = []
    ends = {name: asyncio.Event() for name in "abcde"}

    async def run(name: str) -> None:
        async with bed.stay(name):
            order.append(name)
            await ends[name].wait()

    async def settled() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    tasks = {}
    for name in "abcde":
        tasks[name] = asyncio.create_task(run(name))
        await settled()
    assert order == ["a", "b"]
    with pytest.raises(LimitExceeded, match="2 requests running, which is as many as it may and 3 may wait"):
        async with bed.stay("f"):
            pytest.fail("nobody may wait any more")
    tasks["c"].cancel()
    await settled()
    ends["b"].set()
    await settled()
    assert order == ["a", "b", "d"], "who went away does not hold the place"
    for name in "ade":
        ends[name].set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert order == ["a", "b", "d", "e"]
    async with AsyncExitStack() as stack:
        for name in "xy":
            await stack.enter_async_context(bed.stay(name))


async def test_a_changed_policy_holds_for_the_next_request() -> None:
    bed = Bed(max_concurrent_requests=1)
    async with bed.stay("one"):
        bed.policies = Policies(TenantPolicy(), {})
        async with bed.stay("two"):
            pass


def test_durations_are_written_as_clients_read_them() -> None:
    texts = {0.0: "0ms", 0.0201: "21ms", 1.0: "1s", 1.5: "1.5s", 59.9999: "1m0s", 360.0: "6m0s", 61.25: "1m1.25s"}
    assert {seconds: duration_text(seconds) for seconds in texts} == texts
