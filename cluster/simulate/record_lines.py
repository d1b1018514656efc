"""What a line of a flight record has to hold for a replay, by its kind. Other kinds and other fields may be there."""

from typing import Annotated, Any

import msgspec

from cluster.replica.recorded_engine import EngineFacts
from cluster.replica.resumable_engine import EngineState
from engine.config import CacheConfig
from engine.messages import StepPlan, StepResult
from engine.request import Request


class HeadLine(msgspec.Struct, frozen=True):
    num_ranks: Annotated[int, msgspec.Meta(ge=1)]
    sampling_ranks: Annotated[list[int], msgspec.Meta(min_length=1)]
    engine: EngineFacts


class _Line(msgspec.Struct, frozen=True):
    kind: str
    at_s: float


class _Call(msgspec.Struct, frozen=True):
    """Something that the engine was asked for."""

    turn: int
    is_news: bool


class _Request(_Call, frozen=True):
    request: Request
    arrival: int | None = None


class _Abort(_Call, frozen=True):
    request_id: str


class _LoadAdapter(_Call, frozen=True):
    name: str
    path: str


class _UnloadAdapter(_Call, frozen=True):
    name: str


class _Reset(_Call, frozen=True):
    epoch: int
    cache_config: CacheConfig


class _Plan(msgspec.Struct, frozen=True):
    message: StepPlan


class _Answer(msgspec.Struct, frozen=True):
    rank: int
    message: Annotated[list[Any], msgspec.Meta(min_length=1)]


class _Epoch(msgspec.Struct, frozen=True):
    epoch: int


class _Failure(msgspec.Struct, frozen=True):
    epoch: int
    error: str
    rank: int | None = None


class _Explained(msgspec.Struct, frozen=True):
    num_breaks: int


class _State(msgspec.Struct, frozen=True):
    state: EngineState


_FORMS: dict[str, type[msgspec.Struct]] = {
    "request": _Request,
    "abort": _Abort,
    "load adapter": _LoadAdapter,
    "unload adapter": _UnloadAdapter,
    "reset": _Reset,
    "plan": _Plan,
    "answer": _Answer,
    "epoch": _Epoch,
    "failure": _Failure,
    "explained": _Explained,
    "state": _State,
}


def check_line(line: dict[str, Any]) -> None:
    """Any line but the head. Raises msgspec.ValidationError. Keys are text in JSON, whatever they were."""
    kind = msgspec.convert(line, _Line).kind
    if (form := _FORMS.get(kind)) is not None:
        msgspec.convert(line, form, str_keys=True)
    elif "turn" in line:
        msgspec.convert(line, _Call)
    if kind == "answer" and line["message"][0] == "result":
        msgspec.convert(line["message"], StepResult)
