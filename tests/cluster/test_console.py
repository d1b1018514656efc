"""The console in a browser, over a served remuda-tiny: what a user sees of answers, replicas, ranks and experts."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.browser import Browser, Page
from tests.support.served import Served

# Answers that remuda-tiny is sure of, so that rounding in another batch cannot change them.
QUESTION = "Who are you?"
NEXT_QUESTION = "My name is Zora. What is my name?"
DONE = "document.querySelector('#send').checkVisibility()"
ANSWER = ".message.assistant:last-child .text"


@pytest.fixture
async def page(browser: Browser, served: Served) -> AsyncIterator[Page]:
    async with browser.page(f"{served.url}/console") as opened:
        await opened.until_shown("#state-body")
        yield opened
        assert opened.problems == []


async def asked(served: Served, path: str, body: dict[str, Any] | None = None) -> Any:
    """What another client is answered."""
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        answer = await (client.get(path) if body is None else client.post(path, json=body))
    return answer.raise_for_status().json()


def content_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def test_an_answer_is_streamed_and_is_the_apis(page: Page, served: Served) -> None:
    await page.value("document.querySelector('#temperature').value = '0'")
    await page.value(
        f"""(() => {{
            window.lengths = new Set();
            const log = document.querySelector("#log");
            const look = () => lengths.add(log.querySelector("{ANSWER}")?.textContent.length);
            new MutationObserver(look).observe(log, {{ childList: true, subtree: true, characterData: true }});
        }})()"""
    )
    assert await page.value("document.activeElement.id") == "message"
    await page.type(QUESTION)
    await page.press("Enter")
    await page.until("document.querySelectorAll('.message').length === 2")
    await page.until(DONE)
    assert await page.value("lengths.size") > 2, "it was shown in parts"
    question = {"role": "user", "content": QUESTION}
    body = {"model": "remuda-tiny", "messages": [question], "temperature": 0}
    answer = await asked(served, "/v1/chat/completions", body)
    expected, usage = content_of(answer), answer["usage"]
    assert await page.value(f"document.querySelector('{ANSWER}').textContent") == expected
    note = await page.text(".message.assistant .note")
    assert note.startswith(f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out · first after ")
    # The conversation goes on with all that was said.
    await page.type(NEXT_QUESTION)
    await page.press("Enter")
    await page.until("document.querySelectorAll('.message').length === 4")
    await page.until(DONE)
    said = [question, {"role": "assistant", "content": expected}]
    body["messages"] = [*said, {"role": "user", "content": NEXT_QUESTION}]
    answer = await asked(served, "/v1/chat/completions", body)
    assert await page.value(f"document.querySelector('{ANSWER}').textContent") == content_of(answer)


async def test_a_refusal_is_shown_and_the_message_comes_back(page: Page) -> None:
    await page.value("document.querySelector('#max-tokens').value = '100000'")
    await page.type(QUESTION)
    await page.press("Enter")
    await page.until_shown("#chat-error")
    assert "100000" in (await page.text("#chat-error")).replace(",", "")
    assert await page.value("document.querySelector('#message').value") == QUESTION
    assert await page.value("document.querySelectorAll('.message').length") == 0
    # The browser writes down that a request was refused; nothing else went wrong.
    async with asyncio.timeout(15):
        while not page.problems:  # noqa: ASYNC110  an event that comes when it comes
            await asyncio.sleep(0.01)
    assert [problem.startswith("network: ") and "400" in problem for problem in page.problems] == [True]
    page.problems.clear()


async def test_an_option_that_cannot_be_is_pointed_out(page: Page) -> None:
    await page.value("document.querySelector('#temperature').value = '-1'")
    await page.type(QUESTION)
    await page.press("Enter")
    assert await page.value("document.activeElement.id") == "temperature"
    assert await page.value("document.querySelectorAll('.message').length") == 0


async def test_the_state_is_what_the_server_says(page: Page, served: Served) -> None:
    await page.until("document.querySelectorAll('.replica tbody tr').length === 2")
    status = await asked(served, "/v1/status")
    (replica,) = status["replicas"]
    assert await page.text("#model-name") == "remuda-tiny"
    assert await page.text("#server-state") == "ready"
    assert await page.text(".replica .id") == f"Replica {replica['id']}"
    assert replica["address"] in await page.text(".replica .facts")
    rows = await page.value("[...document.querySelectorAll('.replica tbody tr')].map((r) => r.innerText.split('\\t'))")
    assert [(row[0], row[6], row[7]) for row in rows] == [
        (str(rank["rank"]), rank["host"], str(rank["pid"])) for rank in replica["ranks"]
    ]


async def test_work_is_seen_while_it_is_done(page: Page, served: Served) -> None:
    """Another client's; and that it has gone."""
    body = {"model": "remuda-tiny", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
    requests = [asyncio.create_task(asked(served, "/v1/completions", body)) for _ in range(2)]
    await page.until("document.querySelector('#live-requests').textContent === '2'")
    await page.until("document.querySelector('#running-waiting').textContent === '2, 0'")
    await page.until("parseFloat(document.querySelector('#tokens-per-s').textContent) > 0")
    await page.until("parseFloat(document.querySelector('#kv-usage').textContent) > 0")
    await page.until("parseFloat(document.querySelector('.meter span').style.width) > 0")
    for each in requests:
        each.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    await page.until("document.querySelector('#live-requests').textContent === '0'")
    await page.until("document.querySelector('#running-waiting').textContent === '0, 0'")


async def test_the_heat_map_shows_each_layers_experts(page: Page, served: Served) -> None:
    """By keyboard, against the server's own numbers; and a busier expert has a stronger colour, which has less red."""
    body = {"model": "remuda-tiny", "prompt": "Once", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
    await asked(served, "/v1/completions", body)
    await page.until_shown(".experts canvas")
    await page.value("document.querySelector('.experts canvas').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        await page.press(key)
    async with asyncio.timeout(15):
        while True:  # until the page has the news that the server has
            layers = (await asked(served, "/v1/status"))["replicas"][0]["experts"]["layers"]
            text = f"Layer 3, expert 1: {layers['3'][1]:,} tokens lately, "
            if (await page.text(".cell")).startswith(text):
                break
            await asyncio.sleep(0.1)
    assert list(layers) == ["1", "3", "5", "7"]
    assert all(len(pairs) == 4 and sum(pairs) > 0 for pairs in layers.values())
    await page.value("document.activeElement.blur()")
    reds_by_layer = await page.value(
        """(() => {
            const canvas = document.querySelector(".experts canvas");
            const [wide, high] = [(canvas.clientWidth - 34) / 4, (canvas.clientHeight - 14) / 4];
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const at = (x, y) => data[4 * (Math.floor(y) * canvas.width + Math.floor(x))];
            const cell = (row, column) => at(34 + (column + 0.5) * wide, 14 + (row + 0.5) * high);
            return [0, 1, 2, 3].map((row) => [0, 1, 2, 3].map((column) => cell(row, column)));
        })()"""
    )
    for pairs, reds in zip(layers.values(), reds_by_layer, strict=True):
        for one in range(4):
            for other in range(4):
                assert (reds[one] <= reds[other]) or pairs[one] <= pairs[other], (pairs, reds)


async def test_dark_mode_follows_the_system_or_the_user(page: Page) -> None:
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = await page.value(background)
    await page.prefer("dark")
    dark = await page.value(background)
    assert light != dark
    await page.click("#theme")
    assert await page.value(background) == light
    await page.reload()
    assert await page.value(background) == light, "the choice is kept"
    await page.click("#theme")
    assert await page.value(background) == dark
    await page.prefer("light")
    assert await page.value(background) == light, "what the system says anyway was no choice"


async def test_the_keyboard_reaches_everything(page: Page) -> None:
    await page.until_shown(".experts canvas")
    await page.value("document.querySelector('#theme').focus()")
    reached = []
    for _ in range(7):
        await page.press("Tab")
        reached.append(await page.value("document.activeElement.id || document.activeElement.tagName.toLowerCase()"))
    assert reached == ["new-chat", "summary", "log", "message", "send", "div", "canvas"]
    await page.value("document.querySelector('#message').focus()")
    await page.type("one")
    await page.press("Enter", shift=True)
    await page.type("two")
    assert await page.value("document.querySelector('#message').value") == "one\ntwo"
    assert await page.value("document.querySelectorAll('.message').length") == 0


@pytest.mark.parametrize("width", [320, 720, 1280])
async def test_no_window_is_too_narrow(page: Page, width: int) -> None:
    await page.resize(width, 700)
    await page.until("document.querySelector('.experts canvas').checkVisibility()")
    assert await page.value("document.scrollingElement.scrollWidth") <= width
    await page.value("document.querySelector('.experts').scrollIntoView()")
    await page.value("document.querySelector('#message').scrollIntoView()")
    box = await page.value("(b => [b.left, b.right])(document.querySelector('#send').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= width


async def test_the_policy_holds(browser: Browser, served: Served) -> None:
    """Neither code that stands in the page, nor code made of text, nor anything from elsewhere."""
    async with browser.page(f"{served.url}/console/") as page:
        await page.value(
            """window.refused = []; document.addEventListener("securitypolicyviolation", (event) => {
                refused.push(event.effectiveDirective);
            });
            document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
            document.body.setAttribute("style", "margin: 1px");
            window.allowed = [
                () => { document.body.innerHTML = "<b>x</b>"; },
                () => { document.createElement("script").textContent = "1"; },
                () => { eval("1"); },
            ].map((attempt) => { try { attempt(); return true; } catch { return false; } });
            fetch("http://127.0.0.1:9/").catch(() => {});"""
        )
        expected = ["connect-src", "img-src", "require-trusted-types-for", "style-src-attr"]
        await page.until(f"{json.dumps(expected)}.every((name) => refused.includes(name))")
        assert await page.value("allowed") == [False, False, False]
