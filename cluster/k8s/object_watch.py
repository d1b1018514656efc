"""Follows a list of objects at the API server: list, watch from there, resume, and list anew where that is refused."""

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
GONE = 410

Objects = Sequence[dict[str, Any]]


class ObjectWatch(threading.Thread):
    """A thread: the kubernetes package's calls block.

    Args:
        name: of what is watched, for the log.
        list_call: a ``list_…`` method of the kubernetes package (it tells by the method's documentation what to read).
        on_change: called in this thread with all objects, once they are known and after every change.
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
            delay_s = min(2 * delay_s, MAX_DELAY_S)

    def _list(self) -> str:
        """Returns the version from which to watch."""
        listed = self._list_call(_request_timeout=READ_TIMEOUT_S, **self._selectors)
        plain = client.ApiClient().sanitize_for_serialization(listed)
        self._objects = {each["metadata"]["name"]: each for each in plain.get("items") or ()}
        self._tell()
        version: str = plain["metadata"]["resourceVersion"]
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
            raw = event["raw_object"]
            if event["type"] == "DELETED":
                self._objects.pop(raw["metadata"]["name"], None)
            else:
                self._objects[raw["metadata"]["name"]] = raw
            self._tell()
        return str(watcher.resource_version or version)

    def _tell(self) -> None:
        if not self._stopping.is_set():
            self._on_change(list(self._objects.values()))
