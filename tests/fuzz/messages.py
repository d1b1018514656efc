"""Protobuf messages of every method that the front end serves: good ones, and ones with wrong values or bytes."""

import math
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from cluster.rpc.generated.remuda.v1 import admin_pb2, inference_pb2
from cluster.rpc.generated.vllm import vllm_engine_pb2
from tests.fuzz import hostile
from tests.fuzz.bodies import MODEL

MODULES = (inference_pb2, admin_pb2, vllm_engine_pb2, health_pb2, reflection_pb2)
ENDLESS = frozenset({"/grpc.health.v1.Health/Watch"})
"""Methods whose good answer has no end."""
DRAIN = "/remuda.v1.Admin/Drain"
_OFTEN = 0.2
_FD = FieldDescriptor
_INTEGERS = {
    _FD.TYPE_INT32: (-(2**31), 2**31 - 1),
    _FD.TYPE_SINT32: (-(2**31), 2**31 - 1),
    _FD.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    _FD.TYPE_INT64: (-(2**63), 2**63 - 1),
    _FD.TYPE_SINT64: (-(2**63), 2**63 - 1),
    _FD.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    _FD.TYPE_UINT32: (0, 2**32 - 1),
    _FD.TYPE_FIXED32: (0, 2**32 - 1),
    _FD.TYPE_UINT64: (0, 2**64 - 1),
    _FD.TYPE_FIXED64: (0, 2**64 - 1),
}
_FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-45, 3e38, -3e38, 2.0)
_USUAL: dict[str, tuple[Any, ...]] = {
    "model": (MODEL, ""),
    "text": ("Hi", "Once upon a time"),
    "ids": (300, 301),
    "input_ids": (300, 301),
    "token_ids": (300, 301),
    "role": ("user",),
    "content": ("Hi",),
    "max_tokens": (1, 2, 4),
    "n": (1, 2),
    "temperature": (0.0, 0.7),
    "top_p": (1.0, 0.9),
    "stop": ("\n",),
    "seed": (1, 7),
    "logprobs": (0, 1),
    "service": ("",),
    "repetition_penalty": (1.0,),
    "json_schema": ('{"type": "boolean"}',),
    "regex": ("(left|right)",),
    "lark": ('start: "a"',),
    "gbnf": ('root ::= "a"',),
    "grammar": ('root ::= "a"',),
}


@dataclass(frozen=True)
class Method:
    path: str
    request: Descriptor


def methods() -> list[Method]:
    found: list[Method] = []
    for module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            method: MethodDescriptor
            for method in service.methods:
                found.append(Method(f"/{service.full_name}/{method.name}", method.input_type))
    return found


def good(method: Method, rng: Random, often: float = _OFTEN) -> Message:
    """A message that is a few tokens' work at most."""
    return _filled(method.request, rng, often, 0)


def _filled(kind: Descriptor, rng: Random, often: float, depth: int) -> Message:
    message = GetMessageClass(kind)()
    groups = {group.name: rng.choice(group.fields) for group in kind.oneofs if len(group.fields) > 1}
    for field in kind.fields:
        group = field.containing_oneof
        if group is not None and group.name in groups:
            # Prompts come first; the other choices of a union now and then.
            is_wanted = field is groups[group.name] and (group.name in ("prompt", "input") or rng.random() < often)
        else:
            is_wanted = (
                field.name in ("model", "max_tokens", "sampling", "sampling_params", "messages", "ids", "input_ids")
                or rng.random() < often
            )
        if is_wanted and depth < 5:
            _set(message, field, rng, often, depth)
    return message


def _set(message: Message, field: FieldDescriptor, rng: Random, often: float, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        if value.message_type is None:
            getattr(message, field.name)[_scalar(key, rng)] = _scalar(value, rng)
    elif field.message_type is not None:
        made = _filled(field.message_type, rng, often, depth + 1)
        if field.is_repeated:
            getattr(message, field.name).append(made)
        else:
            getattr(message, field.name).CopyFrom(made)
    elif field.is_repeated:
        getattr(message, field.name).extend(_scalar(field, rng) for _ in range(rng.choice((1, 2, 5))))
    else:
        setattr(message, field.name, _scalar(field, rng))


def _scalar(field: FieldDescriptor, rng: Random) -> Any:
    if field.name in _USUAL:
        return rng.choice(_USUAL[field.name])
    if field.type in _INTEGERS:
        return rng.randrange(0, 5)
    if field.type in (_FD.TYPE_FLOAT, _FD.TYPE_DOUBLE):
        return rng.choice((0.5, 1.0))
    if field.type == _FD.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == _FD.TYPE_ENUM:
        assert field.enum_type is not None
        return rng.choice(field.enum_type.values).number
    return b"a" if field.type == _FD.TYPE_BYTES else "a"


def spoilt(message: Message, rng: Random) -> None:
    """One field of it, or of a message inside, gets a hostile value."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    inner = [value for field, value in message.ListFields() if field.message_type is not None]
    if inner and rng.random() < 0.6:
        chosen = rng.choice(inner)
        if isinstance(chosen, Message):
            spoilt(chosen, rng)
            return
    field = rng.choice(fields)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None:
        _set(message, field, rng, 0.8, 2)
    elif field.is_repeated:
        getattr(message, field.name).extend(_hostile(field, rng) for _ in range(rng.choice((1, 3, 500))))
    else:
        setattr(message, field.name, _hostile(field, rng))


def _hostile(field: FieldDescriptor, rng: Random) -> Any:
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        return rng.choice((low, high, low + 1, high - 1, 0, 1, max(-1, low), 4096, 65536))
    if field.type in (_FD.TYPE_FLOAT, _FD.TYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if field.type == _FD.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == _FD.TYPE_ENUM:
        return rng.choice((-1, 99, 2**31 - 1))
    if field.type == _FD.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 9, 5000)))
    return hostile.text(rng).encode("utf-8", "replace").decode()


def harmless(method: Method, data: bytes) -> bytes:
    """The server stays: what would drain the whole front end names a replica instead."""
    if method.path != DRAIN:
        return data
    try:
        asked = admin_pb2.DrainRequest.FromString(data)
    except Exception:
        return data  # it does not parse there either
    return data if asked.replica else admin_pb2.DrainRequest(replica="nobody").SerializeToString()
