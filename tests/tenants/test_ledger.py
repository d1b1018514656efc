"""Usage: once for each request, wherever it went; the log survives its rotation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from cluster.errors import Unavailable
from cluster.tenants.ledger import RETURN_S, UsageLedger
from cluster.tenants.line_log import LineLog
from cluster.tenants.metrics import MAX_LABELS, TenantMetrics
from cluster.tenants.record import UsageRecord, UsageTotal
from cluster.tenants.redis_store import connect
from cluster.tenants.usage_store import MemoryUsage, RedisUsage, UsageStore
from engine.errors import InvalidOption
from tests.tenants.redis_server import PASSWORD, RedisServer

NOON_S = 1_800_000_000.0
DAY = "2027-01-15"


def record(
    request_id: str, num_prompt: int = 10, num_completion: int = 5, tenant: str = "a", **changes: object
) -> UsageRecord:
    values: dict[str, object] = {
        "time_unix_s": NOON_S,
        "request_id": request_id,
        "tenant": tenant,
        "key_id": "k1",
        "model": "m",
        "outcome": "completed",
        "status": 200,
        "num_prompt_tokens": num_prompt,
        "num_cached_tokens": 4,
        "num_completion_tokens": num_completion,
        "duration_s": 1.5,
    }
    return UsageRecord(**{**values, **changes})  # type: ignore[arg-type]


class Books:
    """One front end's."""

    def __init__(self, store: UsageStore, owner: str = "one", log: LineLog | None = None) -> None:
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.ledger = UsageLedger(store, TenantMetrics(self.registry), log, owner, lambda: self.now_s)

    def metric(self, kind: str) -> float:
        labels = {"tenant": "a", "key": "k1", "model_name": "m", "kind": kind}
        return self.registry.get_sample_value("remuda_tenant_tokens_total", labels) or 0.0


@pytest.fixture(params=["memory", "redis"])
def stores(request: pytest.FixtureRequest, redis: Redis) -> Callable[[], UsageStore]:
    memory = MemoryUsage()
    return lambda: memory if request.param == "memory" else RedisUsage(redis)


async def test_a_request_counts_once(stores: Callable[[], UsageStore]) -> None:
    books = Books(stores())
    for _ in range(3):
        books.ledger.ended(record("r1"))
    books.ledger.ended(record("r2", 3, 0, tenant="b|c", model="x|y"))
    books.ledger.ended(record("refused", 0, 0))
    totals = [UsageTotal(DAY, "a", "k1", "m", 1, 10, 4, 5), UsageTotal(DAY, "b|c", "k1", "x|y", 1, 3, 4, 0)]
    assert await books.ledger.totals(None, None) == totals
    assert await books.ledger.totals("a", [DAY]) == totals[:1]
    assert await books.ledger.totals("a", ["2027-01-16"]) == []
    assert (books.metric("prompt"), books.metric("completion")) == (10, 5)


async def test_a_client_that_comes_back_here_is_counted_at_its_end(stores: Callable[[], UsageStore]) -> None:
    books = Books(stores())
    books.ledger.ended(record("r", 10, 3, outcome="cancelled"), may_return=True)
    await books.ledger.poll()
    assert await books.ledger.totals("a", None) == []
    await books.ledger.came_back("r")
    books.now_s += 2 * RETURN_S
    await books.ledger.poll()
    books.ledger.ended(record("r", 10, 50), came_back=True)
    assert (await books.ledger.totals("a", None))[0].num_completion_tokens == 50
    assert books.metric("completion") == 50


async def test_a_client_that_does_not_is_counted_for_what_it_had(stores: Callable[[], UsageStore]) -> None:
    books = Books(stores())
    books.ledger.ended(record("r", 10, 3), may_return=True)
    books.now_s += RETURN_S
    await books.ledger.poll()
    assert (await books.ledger.totals("a", None))[0].num_completion_tokens == 3
    books.ledger.ended(record("s", 10, 4), may_return=True)
    await books.ledger.close()
    assert (await books.ledger.totals("a", None))[0].num_completion_tokens == 7, "the front end stops"


async def test_a_client_that_goes_to_another_front_end_is_counted_there(redis: Redis) -> None:
    first, second = Books(RedisUsage(redis), "first"), Books(RedisUsage(redis), "second")
    first.ledger.ended(record("r", 10, 3), may_return=True)
    await second.ledger.came_back("r")
    first.now_s += RETURN_S
    await first.ledger.poll()
    assert await first.ledger.totals("a", None) == [] and first.metric("prompt") == 0
    second.ledger.ended(record("r", 10, 50), came_back=True)
    await second.ledger.poll()
    assert (await first.ledger.totals("a", None))[0].num_completion_tokens == 50
    assert (first.metric("completion"), second.metric("completion")) == (0, 50)


async def test_what_was_counted_before_its_client_went_elsewhere_is_not_counted_again(
    redis: Redis, tmp_path: Path
) -> None:
    logs = [LineLog(tmp_path / f"{name}.jsonl", lambda: None) for name in ("first", "second")]
    first, second = Books(RedisUsage(redis), "first", logs[0]), Books(RedisUsage(redis), "second", logs[1])
    first.ledger.ended(record("r", 10, 30, outcome="Draining"))
    await first.ledger.poll()
    for _ in range(2):
        await second.ledger.came_back("r")
        second.ledger.ended(record("r", 10, 50), came_back=True)
        await second.ledger.poll()
    assert await first.ledger.totals(None, None) == [UsageTotal(DAY, "a", "k1", "m", 1, 10, 4, 50)]
    assert (first.metric("prompt"), second.metric("prompt")) == (10, 0)
    assert (first.metric("completion"), second.metric("completion")) == (30, 20)
    for log in logs:
        log.close()
    text = "".join((tmp_path / f"{name}.jsonl").read_text() for name in ("first", "second"))
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["num_completion_tokens"] for line in lines] == [30, 50], "the one with most is right"


async def test_coming_back_for_a_moment_makes_nothing_free(stores: Callable[[], UsageStore]) -> None:
    books = Books(stores())
    books.ledger.ended(record("r", 10, 30), may_return=True)
    await books.ledger.came_back("r")
    books.ledger.ended(record("r", 0, 0), may_return=True, came_back=True)
    books.now_s += RETURN_S
    await books.ledger.poll()
    assert await books.ledger.totals(None, None) == [UsageTotal(DAY, "a", "k1", "m", 1, 10, 4, 30)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_going_elsewhere_for_a_moment_makes_nothing_free(redis: Redis, order: tuple[int, int]) -> None:
    books = [Books(RedisUsage(redis), name) for name in ("first", "second")]
    books[0].ledger.ended(record("r", 10, 30), may_return=True)
    await books[1].ledger.came_back("r")
    books[1].ledger.ended(record("r", 0, 0), may_return=True, came_back=True)
    for index in order:
        books[index].now_s += RETURN_S
        await books[index].ledger.poll()
    assert await books[0].ledger.totals(None, None) == [UsageTotal(DAY, "a", "k1", "m", 1, 10, 4, 30)]


async def test_who_was_turned_away_is_counted_with_who_reads_on(stores: Callable[[], UsageStore]) -> None:
    books = Books(stores())
    await books.ledger.came_back("r")
    books.ledger.ended(record("r", 10, 30), is_taken_over=True)
    books.now_s += RETURN_S
    await books.ledger.poll()
    assert await books.ledger.totals(None, None) == []
    books.ledger.ended(record("r", 10, 20), came_back=True)
    assert await books.ledger.totals(None, None) == [UsageTotal(DAY, "a", "k1", "m", 1, 10, 4, 30)]
    books.ledger.ended(record("r", 10, 30), is_taken_over=True)
    books.now_s += RETURN_S
    await books.ledger.poll()
    assert (await books.ledger.totals(None, None))[0].num_completion_tokens == 30
    assert books.metric("completion") == 30


async def test_one_that_was_refused_when_it_came_back_may_try_again(stores: Callable[[], UsageStore]) -> None:
    books = Books(stores())
    books.ledger.ended(record("r", 10, 30), may_return=True)
    books.ledger.ended(record("r", 0, 0, outcome="LimitExceeded", num_cached_tokens=0), came_back=True)
    await books.ledger.poll()
    assert await books.ledger.totals(None, None) == []
    await books.ledger.came_back("r")
    books.ledger.ended(record("r", 10, 50), came_back=True)
    assert await books.ledger.totals(None, None) == [UsageTotal(DAY, "a", "k1", "m", 1, 10, 4, 50)]


async def test_what_could_not_be_counted_is_when_the_store_is_back(redis_server: RedisServer) -> None:
    client = connect(redis_server.url, PASSWORD)
    books = Books(RedisUsage(client))
    redis_server.stop()
    books.ledger.ended(record("r1"))
    await books.ledger.poll()
    with pytest.raises(Unavailable):
        await books.ledger.totals("a", None)
    assert books.metric("prompt") == 0
    redis_server.start()
    await books.ledger.poll()
    assert (await books.ledger.totals("a", None))[0].num_requests == 1 and books.metric("prompt") == 10
    await client.aclose()


async def test_an_answer_that_was_lost_does_not_lose_the_line(redis: Redis) -> None:
    """Redis has counted, and the front end does not know it."""
    store = RedisUsage(redis)
    counted = await store.count(record("r"), "one", "entry")
    assert counted == ((10, 4, 5), (10, 4, 5))
    assert await store.count(record("r"), "one", "entry") == counted, "it may be noted"
    assert await store.count(record("r"), "two", "another") is None
    assert (await store.totals("a", None))[0].num_requests == 1


def test_the_log_goes_on_in_a_new_file_when_it_was_rotated(tmp_path: Path) -> None:
    path, lost = tmp_path / "usage.jsonl", []
    log = LineLog(path, lambda: lost.append(1))
    log.write(record("r1"))
    log.close()
    log = LineLog(path, lambda: lost.append(1))
    log.write(record("r2"))
    while path.read_text().count("\n") < 2:
        pass
    path.rename(tmp_path / "usage.jsonl.1")
    for number in range(3, 50):
        log.write(record(f"r{number}"))
    log.close()
    lines = (tmp_path / "usage.jsonl.1").read_text().splitlines() + path.read_text().splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == [f"r{number}" for number in range(1, 50)]
    assert json.loads(lines[0]).keys() == set(UsageRecord.__struct_fields__) - {"trace_id"}
    assert path.stat().st_mode & 0o007 == 0 and not lost


def test_a_log_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="cannot be written"):
        LineLog(tmp_path / "nowhere" / "usage.jsonl", lambda: None)
    lost: list[int] = []
    folder = tmp_path / "logs"
    folder.mkdir()
    log = LineLog(folder / "audit.jsonl", lambda: lost.append(1))
    (folder / "audit.jsonl").unlink()
    folder.rmdir()
    log.write(record("r"))
    log.close()
    assert lost == [1]


def test_labels_are_bounded() -> None:
    registry = CollectorRegistry()
    metrics = TenantMetrics(registry)
    for number in range(MAX_LABELS + 50):
        metrics.ended(f"t{number}", "completed")
        metrics.used(record("r", tenant=f"t{number}", key_id=f"k{number}"))
    names = {
        sample.labels["tenant"]
        for metric in registry.collect()
        for sample in metric.samples
        if "tenant" in sample.labels
    }
    assert len(names) == MAX_LABELS + 1 and "other" in names
    labels = {"tenant": "other", "key": "other", "model_name": "other", "kind": "prompt"}
    assert registry.get_sample_value("remuda_tenant_tokens_total", labels) == 500
