"""Inputs for a server that asks who calls, and what it may not answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from urllib.parse import unquote_to_bytes

from tests.fuzz.grpc_inputs import GrpcInput
from tests.fuzz.grpc_wire import GrpcAnswer
from tests.fuzz.guarded import Guard, Shown
from tests.fuzz.http_framing import HOST, HttpInput
from tests.fuzz.http_wire import HttpAnswer

_CLEAR_SHARE = 0.04
_OPEN_PATHS = re.compile(rb"/livez|/readyz|/health|/v2/health/(live|ready)|/console(/.*)?")
_OPEN_SERVICE = b"/grpc.health.v1.Health/"
_NEEDED = {
    b"/metrics": {"metrics"},
    b"/v1/status": {"admin"},
    b"/v1/load_lora_adapter": {"admin"},
    b"/v1/unload_lora_adapter": {"admin"},
    b"/v1/usage": {"infer", "admin"},
}
"""One of these scopes; ``infer`` for any other path."""
_WELL_FRAMED = frozenset({"mutated", "damaged", "garbage", "pipelined"})
_UNAUTHENTICATED_HTTP, _UNAUTHENTICATED_GRPC = 401, 16
_NOBODY = Shown("nothing", ())


@dataclass(frozen=True)
class GuardedInput:
    """``shown``: by each of its requests; of gRPC's, by its one call. ``in_clear``: without TLS."""

    given: HttpInput | GrpcInput
    shown: tuple[Shown, ...]
    in_clear: bool = False


def guarded(given: HttpInput | GrpcInput, guard: Guard, rng: Random) -> GuardedInput:
    """The input with credentials, or without TLS."""
    if rng.random() < _CLEAR_SHARE:
        return GuardedInput(given, (), in_clear=True)
    if isinstance(given, GrpcInput):
        shown = guard.shown(rng)
        return GuardedInput(replace(given, shown=shown.pairs, is_text=shown.is_text), (shown,))
    # Whatever is a request has a Host; of several on one connection each shows its own.
    first, *others = given.data.split(HOST)
    if given.kind == "pipelined":
        each = [shown for _ in range(99) if (shown := guard.shown(rng)).is_text][: len(others)]
    else:
        each = [guard.shown(rng)] * len(others)
    data = first + b"".join(HOST + shown.lines + rest for shown, rest in zip(each, others, strict=True))
    return GuardedInput(replace(given, data=data), tuple(each))


def http_breach(given: GuardedInput, answers: Sequence[HttpAnswer]) -> str | None:
    """What no answer may say to those who show nothing good. None where it does not."""
    assert isinstance(given.given, HttpInput)
    path = _path(given.given.data)
    if _OPEN_PATHS.fullmatch(path):
        return None
    for index, answer in enumerate(answers):
        shown = given.shown[index] if index < len(given.shown) else _NOBODY
        is_refused = not answer.status or answer.status >= 400
        if not is_refused and not (shown.scopes & _NEEDED.get(path, {"infer"})):
            return f"{shown.name}, and the status is {answer.status}"
        if shown.scopes or not shown.is_text or given.given.kind not in _WELL_FRAMED:
            continue
        if answer.status != _UNAUTHENTICATED_HTTP:
            return f"{shown.name}, and the status is {answer.status}, not {_UNAUTHENTICATED_HTTP}"
    return None


def grpc_breach(given: GuardedInput, answer: GrpcAnswer | None) -> str | None:
    """As ``http_breach``."""
    assert isinstance(given.given, GrpcInput)
    path, (shown,) = given.given.path, given.shown
    if answer is None or path.startswith(_OPEN_SERVICE):
        return None
    needed = "admin" if path.startswith(b"/remuda.v1.Admin/") else "infer"
    if needed not in shown.scopes and (answer.status == 0 or answer.data):
        return f"{shown.name}, and the status is {answer.status}, with {len(answer.data)} bytes"
    if not shown.scopes and given.given.is_proper and answer.status != _UNAUTHENTICATED_GRPC:
        return f"{shown.name}, and the status is {answer.status}, not {_UNAUTHENTICATED_GRPC}"
    return None


def _path(data: bytes) -> bytes:
    """Of the first request."""
    words = data.split(b"\r\n", 1)[0].split()
    return unquote_to_bytes(words[1].partition(b"?")[0]) if len(words) > 1 else b""
