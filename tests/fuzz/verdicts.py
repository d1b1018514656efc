"""What no answer may be, whatever was asked."""

import re
import sys
from pathlib import Path

import grpc

from cluster.errors import ERROR_TABLE
from tests.fuzz.grpc_inputs import GrpcInput
from tests.fuzz.grpc_wire import GrpcAnswer
from tests.fuzz.http_framing import HttpInput
from tests.fuzz.http_wire import HttpAnswer

ROOT = Path(__file__).parents[2]
_OUR_FAULT = frozenset(mapping.code for mapping in ERROR_TABLE.values() if mapping.http_status == 500)
_CODE = re.compile(rb'"code": ?"([a-z_]+)"')
_LEAKS = re.compile(
    rb"Traceback|File \"|site-packages|\.py\b|line \d+, in |"
    + b"|".join(re.escape(f"{path}/".encode()) for path in (ROOT, Path(sys.prefix), Path.home()))
    + rb"|object at 0x|[a-z]+_pb2|pydantic|asyncio\.|grpc\._"
)
"""Of our machine or our code; no input says any of it. Folders count with what is in them: an input may say /root."""
_SERVER_FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
_FAULT_NUMBERS = {code.value[0] for code in _SERVER_FAULTS}
_REFUSED = 400


def http_fault(given: HttpInput, answers: list[HttpAnswer]) -> str | None:
    """None where the answers are fine."""
    for answer in answers:
        if not answer.status and given.answers:
            return "the connection was closed without an answer"
        if answer.status >= 500 or 300 <= answer.status < 400:
            return f"status {answer.status}"
        if (found := _LEAKS.search(answer.body + repr(answer.headers).encode())) is not None:
            return f"it tells {found[0]!r}"
        if _OUR_FAULT & {code.decode() for code in _CODE.findall(answer.body)}:
            return "an error of ours in an answer that had begun"
        if any("x-injected" in name for name in answer.headers):
            return "a header was injected"
    return None


def http_is_refused(answers: list[HttpAnswer]) -> bool:
    return not answers or any(not answer.status or answer.status >= _REFUSED for answer in answers)


def grpc_fault(given: GrpcInput, answer: GrpcAnswer | None) -> str | None:
    """None where the answer is fine. Of what breaks gRPC's own rules the library may say INTERNAL, but not we."""
    if answer is None:
        return None
    if answer.http_status >= 500:
        return f"HTTP status {answer.http_status}"
    told = answer.data + repr(answer.trailers).encode() + answer.message.encode()
    if (found := _LEAKS.search(told)) is not None:
        return f"it tells {found[0]!r}"
    if answer.status in _FAULT_NUMBERS and (given.is_proper or "remuda-error-kind" in answer.trailers):
        return f"gRPC status {answer.status}"
    if given.is_proper and answer.is_cut:
        return "the call was cut without a status"
    return None


def grpc_is_refused(answer: GrpcAnswer | None) -> bool:
    return answer is None or answer.status != 0
