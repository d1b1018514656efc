"""How a request ends for one connection: under which name, and whether it goes on for others."""

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from cluster.errors import Cancelled, DeadlineExceeded, Draining, TakenOver
from cluster.frontend.stored_call import Holder, StoredCall
from cluster.replica.keep import Keep
from engine.errors import RemudaError
from engine.request import Output, Request
from tests.frontend.bodies import completion
from tests.frontend.scripted import Gate
from tests.frontend.servers import Served, served
from tests.frontend.service_bed import Build, call
from tests.frontend.test_metrics import scraped


@pytest.mark.parametrize(
    ("error", "goes_on"), [(TakenOver("by another"), True), (Draining("soon"), True), (DeadlineExceeded("late"), False)]
)
async def test_what_others_go_on_with_is_not_ended_by_who_loses_it(
    error: RemudaError, goes_on: bool, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its choices: the first that is lost here says nothing of the others."""
    service, backend, _ = build(Gate(before=[300]))
    keeps: list[Keep | None] = []
    generate = backend.generate

    def noted(request: Request, keep: Keep | None = None, holder: Holder | None = None) -> AsyncGenerator[Output, None]:
        keeps.append(keep)
        return generate(request, keep, holder)

    monkeypatch.setattr(backend, "generate", noted)

    async def read() -> None:
        async for _ in service.generate(call(n=2), stored=StoredCall("completion", "q", b"", 0.0)):
            pass

    reading = asyncio.create_task(read())
    await backend.until(lambda: len(backend.live) == 2)
    assert service.end("q", error)
    with pytest.raises(type(error)):
        await reading
    assert [keep is not None and keep.is_wanted for keep in keeps] == [goes_on] * 2


async def test_what_is_cancelled_has_one_name() -> None:
    """Whether its client left, or somebody ended it by its name."""
    async with served(Gate(before=[300])) as one:
        for is_ended in (False, True):
            async with one.http.stream("POST", "/v1/completions", json=completion(stream=True)) as response:
                lines = response.aiter_lines()
                first = json.loads((await anext(lines)).removeprefix("data: "))
                if is_ended:
                    assert one.front_end.service.end(first["id"], Cancelled("by its name"))
                    assert any('"code":"cancelled"' in line for line in [line async for line in lines])
        async with asyncio.timeout(20):
            while (outcomes := await _outcomes(one)) != {"cancelled": 2.0}:
                assert outcomes.keys() <= {"cancelled"}
                await asyncio.sleep(0.02)


async def _outcomes(one: Served) -> dict[str, float]:
    samples = (await scraped(one)).items()
    return {dict(labels)["outcome"]: number for (name, labels), number in samples if name == "remuda_requests_total"}
