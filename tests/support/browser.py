"""Headless Chromium, driven over its DevTools protocol: what a user sees, presses and is told.

Needs the Debian package chromium. Everything waits for what it waits for, with one bound on all of it.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WAIT_S = 15.0
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    " ": (32, " "),
}
_SHIFT = 8


class Browser:
    """One process for all tests of a run; each page has cookies, storage and cache of its own."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("needs the Debian package chromium")
        options = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
        # Nothing but the server under test: a page that asks for anything else fails.
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium has none for root
        self._process = subprocess.Popen(
            [program, *options, f"--user-data-dir={folder}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._port_file = folder / "DevToolsActivePort"

    def wait(self) -> str:
        """The address that it listens at."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            assert self._process.poll() is None, "chromium ended"
            with contextlib.suppress(FileNotFoundError):
                lines = self._port_file.read_text().split("\n")
                if len(lines) == 2:
                    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.02)
        raise AssertionError(f"chromium did not listen within {WAIT_S} s")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @asynccontextmanager
    async def page(
        self, url: str, width: int = 1280, height: int = 800, *, dark: bool = False
    ) -> AsyncIterator["Page"]:
        """A page that has loaded ``url``."""
        async with aiohttp.ClientSession() as session, session.ws_connect(self.wait(), max_msg_size=0) as socket:
            page = Page(socket)
            reading = asyncio.create_task(page.read())
            try:
                await page.open(url, width, height)
                yield page
                await page.close()
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


class Page:
    """``problems``: what the browser's console has, policy violations and failed requests included."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session = ""
        self._loaded = asyncio.Event()
        self.problems: list[str] = []

    async def read(self) -> None:
        async for received in self._socket:
            message = json.loads(received.data)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            else:
                self._take_event(message["method"], message["params"])

    def _take_event(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            entry = parameters["entry"]
            self.problems.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        async with asyncio.timeout(2 * WAIT_S):
            found = await answer
        assert "error" not in found, f"{method}: {found['error']}"
        result: dict[str, Any] = found["result"]
        return result

    async def open(self, url: str, width: int, height: int) -> None:
        self._context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=self._context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.resize(width, height)
        await self.prefer("light")
        await self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.go(url)

    async def close(self) -> None:
        self._session = ""
        await self.send("Target.disposeBrowserContext", browserContextId=self._context)

    async def go(self, url: str) -> None:
        self._loaded.clear()
        await self.send("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), WAIT_S)

    async def reload(self) -> None:
        self._loaded.clear()
        await self.send("Page.reload")
        await asyncio.wait_for(self._loaded.wait(), WAIT_S)

    async def resize(self, width: int, height: int) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def prefer(self, scheme: str) -> None:
        """``light`` or ``dark``, as the system's setting."""
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def value(self, expression: str) -> Any:
        """Of JavaScript; a promise's when it is there."""
        answer = await self.send(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            allowUnsafeEvalBlockedByCSP=False,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Waits for JavaScript to be true."""
        wait = f"""new Promise((done) => {{
            const endMs = performance.now() + {1000 * WAIT_S};
            const look = () => {{
                if ({condition}) done(true);
                else if (performance.now() > endMs) done(false);
                else setTimeout(look, 10);
            }};
            look();
        }})"""
        if not await self.value(wait):
            raise AssertionError(
                f"not so within {WAIT_S} s: {condition}\n{await self.value('document.body.innerText')}"
            )

    async def text(self, selector: str) -> str:
        found = await self.value(f"document.querySelector({json.dumps(selector)}).innerText")
        return str(found)

    async def is_shown(self, selector: str) -> bool:
        return bool(await self.value(f"document.querySelector({json.dumps(selector)}).checkVisibility()"))

    async def until_shown(self, selector: str) -> None:
        await self.until(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")

    async def click(self, selector: str) -> None:
        """Where its middle is: what covers it gets the click, as with a user."""
        x, y = await self.value(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{ block: "nearest" }});
                const box = element.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        code, text = _KEYS[key]
        name = "Space" if key == " " else key
        common = {"key": key, "code": name, "windowsVirtualKeyCode": code, "modifiers": _SHIFT if shift else 0}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    async def screenshot(self) -> bytes:
        """A PNG of what is to be seen."""
        return base64.b64decode((await self.send("Page.captureScreenshot", format="png"))["data"])


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield started
    finally:
        started.close()
