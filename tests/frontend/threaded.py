"""A whole front end in a thread with an event loop of its own, for tests and clients that block."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.frontend.backend import Backend
from tests.frontend.scripted import Script
from tests.frontend.servers import Served, served

_STEP_S = 30.0


@contextmanager
def serving(script: Script | Backend, **changes: Any) -> Iterator[Served]:
    """As ``served``; the caller uses the ports alone."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front end")
    thread.start()
    context = served(script, **changes)
    try:
        one = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(_STEP_S)
        try:
            yield one
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(_STEP_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
