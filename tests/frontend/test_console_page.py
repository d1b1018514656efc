"""The console in a browser, where servers refuse, break off or are not there, and where they ask for a key."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cluster.errors import Unavailable
from engine.request import Output, Request
from tests.frontend.scripted import says
from tests.frontend.servers import served
from tests.identity.test_served_keys import guarded, made_key, with_keys
from tests.support.browser import Browser, Page

SENT = "document.querySelectorAll('.message').length === 2"
DONE = "document.querySelector('#send').checkVisibility()"


async def endless(request: Request) -> AsyncGenerator[Output, None]:
    while True:
        yield Output(request.request_id, [300])
        await asyncio.sleep(0.01)


async def say(page: Page, text: str = "Hello") -> None:
    await page.value("document.querySelector('#message').focus()")
    await page.type(text)
    await page.press("Enter")


@pytest.mark.parametrize("how", ["Escape", "button", "new chat"])
async def test_stopping_ends_the_work(browser: Browser, how: str) -> None:
    """In the engine too, at once; what was said stays, unless the conversation is thrown away."""
    async with served(endless) as one, browser.page(f"{one.url}/console/") as page:
        await say(page)
        await page.until("document.querySelector('.assistant .text')?.textContent.length > 5")
        if how == "Escape":
            await page.press("Escape")
        else:
            await page.click("#stop" if how == "button" else "#new-chat")
        await page.until(DONE)
        await one.backend.until(lambda: len(one.backend.aborted) == 1 and not one.backend.live)
        assert await page.value("document.activeElement.id") == "message"
        if how == "new chat":
            assert await page.value("document.querySelectorAll('.message').length") == 0
            assert await page.is_shown("#empty")
        else:
            assert await page.text(".assistant .note") == "Stopped"
            assert await page.value("document.querySelector('.assistant .text').textContent.length") > 5
        assert not await page.is_shown("#chat-error")
        assert page.problems == []


async def test_an_answer_that_breaks_off_says_why(browser: Browser) -> None:
    async def breaks(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [300, 301])
        raise Unavailable("the replica is gone")

    async with served(breaks) as one, browser.page(f"{one.url}/console/") as page:
        await say(page)
        await page.until_shown("#chat-error")
        assert await page.text("#chat-error") == "the replica is gone"
        assert await page.text(".assistant .note") == "Broken off"
        assert page.problems == []


async def test_an_answer_cut_off_by_its_length_says_so(browser: Browser) -> None:
    async with served(says([300, 301, 302])) as one, browser.page(f"{one.url}/console/") as page:
        await say(page)
        await page.until_shown(".assistant .note")
        assert (await page.text(".assistant .note")).endswith("cut off at max tokens")


async def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    infer = made_key(path)["key"]
    both = made_key(path, "--scope", "infer", "--scope", "admin")["key"]
    kept = "Object.values(sessionStorage).length + Object.values(localStorage).length"
    async with guarded(with_keys(path)) as one, browser.page(f"{one.url}/console/") as page:
        await page.until_shown("#key-form")
        assert not await page.is_shown("#state-body") and await page.text("#model-name") == ""

        async def use(key: str) -> None:
            await page.value("document.querySelector('#key').focus()")
            await page.type(key)
            await page.press("Enter")

        await use("rmd_wrong")
        await page.until("document.querySelector('#key-notice').textContent === 'The server refused this key.'")
        await use(infer)
        await page.until("!document.querySelector('#key-form').checkVisibility()")
        await page.until_shown("#state-notice")
        assert "admin" in await page.text("#state-notice") and not await page.is_shown("#state-body")
        await say(page)
        await page.until_shown(".assistant .note")
        assert one.backend.requests
        await page.click("#forget-key")
        await page.until_shown("#key-form")
        assert await page.value(kept) == 0
        await use(both)
        await page.until_shown("#state-body")
        await page.reload()
        await page.until_shown("#state-body")
        assert await page.value(kept) == 1
    # The browser tells of each refusal; nothing else went wrong.
    assert all(problem.startswith("network: ") and ("401" in problem or "403" in problem) for problem in page.problems)


async def test_a_server_that_goes_away_is_told_and_comes_back(browser: Browser) -> None:
    server = AsyncExitStack()
    one = await server.enter_async_context(served(says([300])))
    port = one.front_end.port
    async with server, browser.page(f"{one.url}/console/") as page:
        await page.until_shown("#state-body")
        await server.aclose()
        await page.until_shown("#state-notice")
        assert await page.text("#state-notice") == "The server cannot be reached. What is shown is old."
        await say(page)
        await page.until_shown("#chat-error")
        assert await page.text("#chat-error") == "The server cannot be reached."
        assert await page.value("document.querySelector('#message').value") == "Hello"
        async with served(says([300]), port=port):
            await page.until("!document.querySelector('#state-notice').checkVisibility()")
