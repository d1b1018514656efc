"""Follows a list of objects at the API server: list, watch from there, resume, and list anew where that is refused."""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import urllib3
from kubernetes import client, watch

_log = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 240
"""After it the server ends a watch, which then goes on from where it was."""
READ_TIMEOUT_S = WATCH_TIMEOUT_S + 30
"""A connection that says nothing for so long has died without telling."""
MIN_INTERVAL_S = 1.0
MAX_DELAY_S = 30.0
PAGE_SIZE = 100
"""Of a list: a large cluster's nodes at once are 100 MB of JSON, and whoever decodes them lets nobody else run."""
GONE = 410

Objects = Sequence[dict[str, Any]]


class ObjectWatch(threading.Thread):
    """A thread: the kubernetes package's calls block.

    Args:
        name: of what is watched, for the log.
        list_call: a ``list_…`` method of the kubernetes package (it tells by the method's documentation what to read).
        on_change: called in this thread with all objects, once they are known and after every change of what is kept
            of them: nothing of their status, which changes often and is long.
        selectors: arguments of ``list_call``.
    """

    def __init__(
        self, name: str, list_call: Callable[..., Any], on_change: Callable[[Objects], None], **selectors: str
    ) -> None:
        super().__init__(name=f"watch {name}", daemon=True)
        self._what = name
        self._list_call = list_call
        self._on_change = on_change
        self._selectors = selectors
        self._objects: dict[str, dict[str, Any]] = {}
        self._stopping = threading.Event()
        self._watch: watch.Watch | None = None

    def stop(self) -> None:
        """It ends with the next word of the server's; nothing is told any more."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.stop()

    def run(self) -> None:
        delay_s = 0.5
        while not self._stopping.is_set():
            try:
                version = self._list()
                delay_s = 0.5
                while not self._stopping.is_set():
                    began_s = time.monotonic()
                    version = self._follow(version)
                    # A server (or a proxy before it) that ends every watch at once is not asked in a loop.
                    self._stopping.wait(max(0.0, began_s + MIN_INTERVAL_S - time.monotonic()))
            except client.ApiException as error:
                if error.status != GONE:
                    _log.warning("%s: the API server says %s %s; trying again", self._what, error.status, error.reason)
                    self._stopping.wait(delay_s)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                # What is known stays: an API server that is away does not stop anybody's pods.
                _log.warning("%s: the API server cannot be reached: %s; trying again", self._what, error)
                self._stopping.wait(delay_s)
            except Exception:  # noqa: BLE001  whatever it was, the thread goes on
                # As an answer of a proxy that is no JSON. Nobody else would follow the list any more.
                _log.exception("%s: what the API server said was not understood; trying again", self._what)
                self._stopping.wait(delay_s)
            delay_s = min(2 * delay_s, MAX_DELAY_S)

    def _list(self) -> str:
        """Returns the version from which to watch."""
        objects: dict[str, dict[str, Any]] = {}
        page: dict[str, str] = {}
        while True:
            answer = self._list_call(
                limit=PAGE_SIZE,
                **page,
                **self._selectors,
                _request_timeout=READ_TIMEOUT_S,
                _preload_content=False,
            )
            listed = json.loads(answer.data)
            objects |= {each["metadata"]["name"]: _kept(each) for each in listed.get("items") or ()}
            if not listed["metadata"].get("continue"):
                break
            page = {"_continue": listed["metadata"]["continue"]}
        self._objects = objects
        self._tell()
        version: str = listed["metadata"]["resourceVersion"]
        return version

    def _follow(self, version: str) -> str:
        """One watch, until the server ends it. Returns the version from which to go on. Raises ApiException."""
        self._watch = watcher = watch.Watch()
        for event in watcher.stream(
            self._list_call,
            **self._selectors,
            resource_version=version,
            timeout_seconds=WATCH_TIMEOUT_S,
            _request_timeout=READ_TIMEOUT_S,
            allow_watch_bookmarks=True,
        ):
            if self._stopping.is_set():
                break
            if event is None or event["type"] == "BOOKMARK":
                continue
            self._take(event["type"], event["raw_object"])
        return str(watcher.resource_version or version)

    def _take(self, kind: str, raw: dict[str, Any]) -> None:
        name = raw["metadata"]["name"]
        before, now = self._objects.get(name), None if kind == "DELETED" else _kept(raw)
        if now == before:
            return
        if now is None:
            del self._objects[name]
        else:
            self._objects[name] = now
        self._tell()

    def _tell(self) -> None:
        if not self._stopping.is_set():
            self._on_change(list(self._objects.values()))


def _kept(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in ("metadata", "status")} | {
        "metadata": {"name": raw["metadata"]["name"]}
    }
