"""Time that is a number, and a network on it."""

import asyncio
import random

import pytest

from cluster.simulate.network import KEEPALIVE_S, Broken, End, Network
from cluster.simulate.virtual_loop import Stuck, run


def test_an_hour_passes_at_once_and_in_order() -> None:
    async def main() -> list[tuple[float, str]]:
        loop = asyncio.get_running_loop()
        seen: list[tuple[float, str]] = []

        async def wait(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((loop.time(), name))

        await asyncio.gather(wait("late", 3600.0), wait("soon", 0.1), wait("between", 7.25))
        return seen

    assert run(main) == [(0.1, "soon"), (7.25, "between"), (3600.0, "late")]


def test_a_wait_that_nothing_can_end_is_an_error() -> None:
    with pytest.raises(Stuck):
        run(lambda: asyncio.Event().wait())


def test_an_error_that_nobody_awaits_is_one() -> None:
    async def fail() -> None:
        raise ValueError("lost")

    async def main() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(1.0)
        del task

    with pytest.raises(ValueError, match="lost"):
        run(main)


def test_threads_are_refused() -> None:
    with pytest.raises(AssertionError, match="thread"):
        run(lambda: asyncio.to_thread(print))


async def _pair(network: Network) -> tuple[End, End]:
    accepted: list[End] = []
    network.listen("b:1", accepted.append)
    return await network.connect("a", "b:1"), accepted[0]


def test_messages_come_once_in_order_and_late() -> None:
    async def main() -> None:
        near, far = await _pair(Network(random.Random(1), delay_s=0.5))
        for number in range(50):
            near.send(number)
        began_s = asyncio.get_running_loop().time()
        assert [await far.receive() for _ in range(50)] == list(range(50))
        assert 0.05 < asyncio.get_running_loop().time() - began_s <= 0.6

    run(main)


@pytest.mark.parametrize(("cut_s", "arrives"), [(KEEPALIVE_S - 1, True), (KEEPALIVE_S + 1, False)])
def test_a_link_that_heals_in_time_loses_nothing(cut_s: float, arrives: bool) -> None:
    async def main() -> None:
        network = Network(random.Random(1))
        near, far = await _pair(network)
        network.cut("a", "b")
        near.send("x")
        asyncio.get_running_loop().call_later(cut_s, network.heal, "a", "b")
        if arrives:
            assert await far.receive() == "x"
            assert asyncio.get_running_loop().time() >= cut_s
        else:
            with pytest.raises(Broken):
                await far.receive()
            with pytest.raises(Broken):
                near.send("y")

    run(main)


def test_nobody_listens() -> None:
    with pytest.raises(Broken, match="nobody listens"):
        run(lambda: Network(random.Random(1)).connect("a", "b:1"))
