"""What schedulers hold, noted down between two plans and put together again in another process, for flight records.

Whatever can be reached from an engine's requests and schedulers is noted; objects of the classes below under numbers,
so that what shared one shares it again. Long lists are copied whole, not looked at one by one: the ranks compute
meanwhile, but an engine waits. What follows from the rest (names of blocks, by tokens) is left out.

A noted value is itself where it is a number, text, truth or None, else [tag, …]: see ``_Freezer`` for the tags. Only
what is already in JSON can be put together again.
"""

import base64
import operator
from collections import defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import msgspec

from engine.block_hash import extend_hashes
from engine.request import AdapterInfo, Request
from engine.scheduler.account import Account
from engine.scheduler.adapter_table import Adapter, AdapterTable
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.break_trials import BreakTrials
from engine.scheduler.fair_queue import FairQueue, Level
from engine.scheduler.latency_budget import LatencyBudget
from engine.scheduler.lockstep import Lockstep
from engine.scheduler.prompt_costs import PromptCosts
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_in_flight import StepInFlight

_CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Account,
        Adapter,
        AdapterTable,
        BlockPool,
        BreakTrials,
        FairQueue,
        LatencyBudget,
        Level,
        Lockstep,
        PromptCosts,
        RequestState,
        Scheduler,
        StepInFlight,
    )
}
_PLAIN = frozenset((int, float, str, bool, type(None)))
_OF_TOKENS = {"generated", "num_hashes"}
"""Of a RequestState: its tokens behind those that it came with, and how many of its blocks have names."""
_LEFT_OUT = {
    "AdapterTable": {"_config"},
    "BlockPool": {"_key_of"},  # the other way round it is in _block_of
    "BreakTrials": {"on_explained"},
    # What its request says, and its tokens and names of blocks, which are noted in another form.
    "RequestState": {
        *("request_id", "sampling", "tenant", "priority", "num_prompt_tokens", "max_num_tokens", "num_given_tokens"),
        *("token_ids", "block_hashes", "timeline"),
    },
    "Scheduler": {"_config", "_tables"},
}
_SLOTS = {
    cls: tuple(name for name in cls.__slots__ if name not in _LEFT_OUT.get(name_of_class, ()))
    for name_of_class, cls in _CLASSES.items()
    if hasattr(cls, "__slots__")
}
_GET = {cls: operator.attrgetter(*names) for cls, names in _SLOTS.items()}

Noted = Any
"""A value in the form above."""


class Unreadable(ValueError):
    """What was noted cannot be put together: it is damaged, or another version's."""


class Snapshot(msgspec.Struct, frozen=True, gc=False):
    """Args:
    arrivals: of the requests that are in it, whose Request is noted elsewhere.
    objects: class and fields of each.
    roots: where to begin.
    """

    arrivals: list[int]
    objects: list[tuple[str, dict[str, Noted]]]
    roots: dict[str, Noted]


def _fields(value: Any) -> dict[str, Any]:
    if (names := _SLOTS.get(type(value))) is not None:
        return dict(zip(names, _GET[type(value)](value), strict=True))
    left_out = _LEFT_OUT.get(type(value).__name__, ())
    return {name: each for name, each in vars(value).items() if name not in left_out}


def freeze(roots: Mapping[str, Any]) -> Snapshot:
    """Nothing that changes later is shared with the snapshot."""
    freezer = _Freezer()
    noted = {name: freezer.note(value) for name, value in roots.items()}
    return Snapshot(freezer.arrivals, freezer.objects, noted)


class _Freezer:
    """Tags: l list, t tuple, s set, q deque, d dict (keys, values), k dict without values, b bytes, n list of bytes, o
    object (number), f future (whether it has ended), a AdapterInfo, ? of no known class (its name)."""

    def __init__(self) -> None:
        self.arrivals: list[int] = []
        self.objects: list[tuple[str, dict[str, Noted]]] = []
        self._numbers: dict[int, int] = {}

    def note(self, value: Any) -> Noted:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is list:
            return self._list(value.copy())
        if kind is tuple:
            return ["t", [self.note(each) for each in value]]
        if isinstance(value, dict):
            return self._dict(value)
        if kind is set:
            return ["s", sorted(value)]
        if kind is deque:
            return ["q", [self.note(each) for each in value]]
        if kind is bytes:
            return ["b", value]
        if kind is Future:
            return ["f", value.done()]
        if kind is AdapterInfo:
            return ["a", value]
        return ["o", self._object(value)] if kind.__name__ in _CLASSES else ["?", kind.__name__]

    def _list(self, values: list[Any]) -> Noted:
        """Of one type, as lists are: the first says what is in it. It is nobody else's."""
        kind = type(values[0]) if values else int
        if kind in _PLAIN and kind is not type(None):
            return ["l", values]
        return ["n", values] if kind is bytes else ["l", [self.note(each) for each in values]]

    def _dict(self, value: dict[Any, Any]) -> Noted:
        keys = self._list(list(value))
        has_values = bool(value) and next(iter(value.values())) is not None
        return ["d", keys, self._list(list(value.values()))] if has_values else ["k", keys]

    def _object(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.objects)
            fields = _fields(value)
            self.objects.append((type(value).__name__, fields))
            for field, each in fields.items():
                if type(each) not in _PLAIN:
                    fields[field] = self.note(each)
            if isinstance(value, RequestState):
                self.arrivals.append(value.arrival)
                fields["generated"] = value.token_ids[value.num_given_tokens :]
                fields["num_hashes"] = len(value.block_hashes)
        return number


def thaw(
    snapshot: Snapshot, requests: Mapping[int, Request], into: Mapping[str, Any], block_size: int
) -> dict[str, Any]:
    """The roots. Those that ``into`` has, new and with nothing in them, are filled.

    Args:
        snapshot: from JSON.
        requests: by arrival.
        block_size: tokens of a block.

    Raises Unreadable.
    """
    thawer = _Thawer(snapshot, requests, block_size)
    try:
        for name, value in into.items():
            thawer.fill_with(snapshot.roots[name], value)
        return {name: thawer.value(noted) for name, noted in snapshot.roots.items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


class _Thawer:
    def __init__(self, snapshot: Snapshot, requests: Mapping[int, Request], block_size: int) -> None:
        self._snapshot = snapshot
        self._requests = requests
        self._block_size = block_size
        self._made: dict[int, Any] = {}

    def value(self, noted: Noted) -> Any:
        if type(noted) in _PLAIN:
            return noted
        tag, *rest = noted
        match tag:
            case "l":
                return [self.value(each) for each in rest[0]]
            case "t":
                return tuple(self.value(each) for each in rest[0])
            case "s":
                return set(rest[0])
            case "q":
                return deque(self.value(each) for each in rest[0])
            case "d":
                return dict(zip(self.value(rest[0]), self.value(rest[1]), strict=True))
            case "k":
                return dict.fromkeys(self.value(rest[0]))
            case "b":
                return base64.b64decode(rest[0], validate=True)
            case "n":
                return [base64.b64decode(each, validate=True) for each in rest[0]]
            case "f":
                return _future(rest[0])
            case "a":
                return msgspec.convert(rest[0], AdapterInfo)
            case "o":
                return self._object(rest[0])
            case "?":
                raise ValueError(f"a {rest[0]} cannot be noted")
        raise ValueError(f"no value has the tag {tag!r}")

    def _object(self, number: int) -> Any:
        if number not in self._made:
            name, fields = self._snapshot.objects[number]
            if name == "RequestState":
                made: Any = RequestState.of(self._requests[fields["arrival"]], fields["arrival"])
            else:
                made = object.__new__(_CLASSES[name])
            self._made[number] = made
            self._fill(number, made, {})
        return self._made[number]

    def fill_with(self, noted: Noted, target: Any) -> None:
        """``target``, or what is in that list of targets, gets the values of the object that is noted."""
        if isinstance(target, list):
            for each, one in zip(noted[1], target, strict=True):
                self.fill_with(each, one)
            return
        tag, number = noted
        if tag != "o" or self._snapshot.objects[number][0] != type(target).__name__:
            raise ValueError(f"no {type(target).__name__} is noted where one is due")
        self._made[number] = target
        self._fill(number, target, _fields(target))

    def _fill(self, number: int, target: Any, present: dict[str, Any]) -> None:
        """``present``: its parts that are filled in their turn, for others know them."""
        fields = self._snapshot.objects[number][1]
        due = {*present, *_SLOTS.get(type(target), ())}
        if missing := sorted(due - fields.keys()):
            raise ValueError(f"{type(target).__name__} is noted without {', '.join(missing)}")
        for name in fields.keys() - _OF_TOKENS:
            part, noted = present.get(name), fields[name]
            if type(part).__name__ in _CLASSES:
                self.fill_with(noted, part)
            elif isinstance(part, defaultdict):
                part.clear()
                part.update(self.value(noted))
            else:
                setattr(target, name, self.value(noted))
        if isinstance(target, RequestState):
            target.token_ids += self.value(["l", fields["generated"]])
            num_hashes = fields["num_hashes"]
            extend_hashes(target.block_hashes, target.root_hash, target.token_ids, num_hashes, self._block_size)
        elif isinstance(target, BlockPool):
            target._key_of = {
                block: (group, name) for group, found in target._block_of.items() for name, block in found.items()
            }


def _future(is_done: bool) -> "Future[Any]":
    future: Future[Any] = Future()
    if is_done:
        future.set_result(None)
    return future
