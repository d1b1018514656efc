"""The HTTP server's own part: its date, and its end."""

import asyncio
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from starlette.responses import PlainTextResponse

from cluster.frontend.http_protocol import HttpLimits
from cluster.frontend.listeners import HttpListener


async def test_every_answer_has_the_date_of_its_moment() -> None:
    listener = HttpListener(PlainTextResponse("here"), "127.0.0.1", 0, HttpLimits())
    await listener.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}") as client:
            dates = []
            for _ in range(2):
                answer = await client.get("/")
                dates.append(parsedate_to_datetime(answer.headers["date"]))
                assert answer.text == "here" and len(answer.headers.get_list("date")) == 1
                assert abs((datetime.now(UTC) - dates[-1]).total_seconds()) < 2
                await asyncio.sleep(1.05)
            assert dates[1] > dates[0]
    finally:
        await listener.stop()


async def test_it_ends_at_once_when_it_is_told_to() -> None:
    listener = HttpListener(PlainTextResponse("here"), "127.0.0.1", 0, HttpLimits())
    await listener.start()
    began_s = time.monotonic()
    await listener.stop()
    assert time.monotonic() - began_s < 1.0
