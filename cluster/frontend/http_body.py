"""Request bodies: bounded, parsed strictly; and work that ends when its client goes away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from cluster.errors import Cancelled, PayloadTooLarge
from cluster.frontend.openai_schema import Body
from engine.errors import InvalidRequest

MAX_STRINGS = 200_000
MAX_CONTAINERS = 50_000
"""Of one body, far beyond what a million tokens of messages need."""
_HARMLESS_BYTES = 64 << 10

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Body)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLarge: as soon as the bound is passed, or would be by the length that the header names.
        Cancelled: the client went before the end.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise PayloadTooLarge(f"the body has {declared} bytes; at most {max_bytes} are taken")
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise PayloadTooLarge(f"the body has more than {max_bytes} bytes")
            chunks.append(chunk)
    except ClientDisconnect:
        raise Cancelled("the client went away while it sent its request") from None
    return b"".join(chunks)


def check_shape(body: bytes, max_values: int) -> None:
    """Bounds what parsing can cost, at a hundredth of that cost: a parser holds the interpreter from end to end, and
    takes hundreds of bytes of memory for each ``[``.

    Raises InvalidRequest. Text that is not JSON passes, or not; the parser has the last word on it.
    """
    if len(body) <= _HARMLESS_BYTES:
        return
    # Without escaped characters, every second piece between quotation marks is outside of strings.
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    _check_count("strings", bare.count(b'"') // 2, MAX_STRINGS)
    outside = b"".join(bare.split(b'"')[::2])
    _check_count("lists and objects", outside.count(b"[") + outside.count(b"{"), MAX_CONTAINERS)
    _check_count("values", outside.count(b","), max_values)


def _check_count(what: str, number: int, most: int) -> None:
    if number > most:
        raise InvalidRequest(f"the body has {number} {what}; at most {most} are taken", None)


def parse_body(kind: type[_M], body: bytes) -> _M:
    """Raises InvalidRequest, which names the first bad field."""
    check_shape(body, kind.max_values)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidRequest(f"the body is not valid JSON: {first['msg']}") from None
        # Below a list's entry, the path goes on with the names of a union's members.
        path = [str(part) for part in first["loc"]]
        depth = 3 if len(path) > 1 and path[1].isdecimal() else 1
        param = ".".join(path[:depth]) or None
        raise InvalidRequest(f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}", param) from None


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The work's result. Raises Cancelled, the work stopped, when the client goes away first."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client went away")
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
