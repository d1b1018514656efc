"""Whose work is next where threads are few."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from cluster.frontend.calls import TextPrompt
from cluster.frontend.fair_threads import FairThreads
from cluster.frontend.tokenizer import Tokenizer
from cluster.identity.principal import INFER, Principal, acting_as
from tests.frontend.scripted import replica_info, says
from tests.frontend.service_bed import Build

WAIT_S = 60


class Held:
    """Work that says that it runs, and ends when the test lets it."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.may_end = threading.Semaphore(0)
        self._news = threading.Condition()

    def __call__(self, name: str) -> str:
        with self._news:
            self.order.append(name)
            self._news.notify_all()
        assert self.may_end.acquire(timeout=WAIT_S)
        return name

    async def until(self, num_begun: int) -> None:
        def begun() -> None:
            with self._news:
                assert self._news.wait_for(lambda: len(self.order) >= num_begun, WAIT_S)

        await asyncio.to_thread(begun)


def of(tenant: str) -> Principal:
    return Principal(tenant, "", "key", frozenset({INFER}))


@pytest.fixture
def one_thread() -> Iterator[FairThreads]:
    threads = FairThreads(1, "held")
    yield threads
    threads.close()


def begin(threads: FairThreads, held: Held, name: str) -> asyncio.Task[str]:
    """``name``: the tenant is its first letter."""
    with acting_as(of(name[0])):
        return asyncio.create_task(threads.run(held, name))


async def test_tenants_take_turns_and_each_keeps_its_order(one_thread: FairThreads) -> None:
    held = Held()
    names = ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]
    tasks = [begin(one_thread, held, name) for name in names]
    await held.until(1)
    held.may_end.release(len(names))
    assert await asyncio.gather(*tasks) == names
    assert held.order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_a_job_whose_client_left_is_not_done_and_one_under_way_keeps_its_thread(one_thread: FairThreads) -> None:
    held = Held()
    first, *left, last = [begin(one_thread, held, name) for name in ("a1", "a2", "b1", "c1")]
    await held.until(1)
    for task in (first, *left):
        task.cancel()
    await asyncio.gather(first, *left, return_exceptions=True)
    assert held.order == ["a1"], "its thread is not free yet"
    held.may_end.release(2)
    assert await last == "c1" and held.order == ["a1", "c1"]


async def test_an_error_is_the_callers_and_the_thread_goes_on(one_thread: FairThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        await one_thread.run(divmod, 1, 0)
    assert await one_thread.run(divmod, 7, 2) == (3, 1)


async def test_what_waits_when_it_closes_is_cancelled() -> None:
    threads, held = FairThreads(1, "held"), Held()
    running, waiting = begin(threads, held, "a1"), begin(threads, held, "b1")
    await held.until(1)
    held.may_end.release()
    threads.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await running == "a1"


async def test_a_tenants_long_prompts_are_not_in_anothers_way(
    build: Build, tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is the real one, held before each text."""
    service, backend, _ = build(says([300]), max_live=32)
    backend.infos = [replica_info(max_model_len=10_000_000)]
    held, encode = Held(), tiny.encode

    def held_encode(text: str, *args: bool) -> list[int]:
        held(text[0])
        return encode(text, *args)

    monkeypatch.setattr(tiny, "encode", held_encode)
    names = ["a"] * 6 + ["b", "c"]
    tasks = []
    for name in names:
        with acting_as(of(name)):
            tasks.append(asyncio.create_task(service.tokenize(TextPrompt(f"{name} " + "word " * 10_000))))
    await held.until(1)
    held.may_end.release(len(names))
    for ids in await asyncio.gather(*tasks):
        assert len(ids) > 10_000
    assert "".join(held.order) == "aabcaaaa", "one more of the tenant that is at it, then the others"
