"""Values that servers stumble over, and JSON that has them in it."""

import json
from random import Random
from typing import Any


class Raw(str):
    """JSON text that stands for itself, whether it is JSON or not."""


NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    255,
    1025,
    2**31 - 1,
    2**31,
    -(2**31) - 1,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    2**64,
    0.5,
    -0.5,
    1e-320,
    1e308,
    -1e308,
    3.0,
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "01", "0x10", "1.", ".5", "+1", "1e", "1_000")),
    Raw("1" * 400),
    Raw("-" + "9" * 5000),
    Raw("1e" + "9" * 300),
    Raw("0." + "3" * 3000),
)

STRINGS: tuple[str, ...] = (
    "",
    " ",
    "\0",
    "\r\nx-injected: 1",
    "\ud800",
    "a\udfff\ud800b",
    "\u2028\u2029",
    "\u202etxt",
    "\ufeff",
    "\uffff",
    "👩\u200d👩\u200d👧\u200d👦" * 20,
    "e" + "\u0301" * 500,
    "٣",
    "½",
    "a" * 3000,
    "a b " * 5000,
    "%s%n%x",
    "nan",
    "1e999",
    "<|begin_of_text|>",
    "<|eot_id|>" * 50,
    "<s>[INST]",
    "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "../../../../etc/hostname",
    "/v1/models",
    "file:///etc/hostname",
    "http://127.0.0.1:9/",
    "data:image/png;base64,AAAA",
    "(a+)+$",
    "(x{100}){100}",
    "((((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}){9}",
    "[",
    "(?=a)",
    "\\",
    "a{99999}",
    "(?P<n>a)(?P=n)",
    'start: start start | "a"',
    "start: /a*/*",
    "%json {}",
    "root ::= root root",
    'root ::= ("a"+)+',
    "[" * 2000,
    '{"a":' * 500,
    '{"$ref": "#"}',
    '{"type": "string", "pattern": "(a+)+$"}',
    "; drop table",
    "json",
    "text",
)

SCHEMAS: tuple[dict[str, Any], ...] = (
    {"$ref": "#"},
    {"type": "objekt"},
    {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    {"$ref": "http://127.0.0.1:9/schema"},
    {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    {"type": "string", "pattern": "(a+)+$", "minLength": 10**9},
    {"type": "array", "minItems": 2**40, "items": {"enum": []}},
    {"type": "integer", "minimum": 1, "maximum": 0},
    {"enum": list(range(2000))},
    {"properties": {str(key): {"type": "string"} for key in range(300)}, "required": [str(key) for key in range(300)]},
    {"anyOf": [{"not": {}}]},
)


def number(rng: Random) -> Any:
    return rng.choice(NUMBERS)


def text(rng: Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(STRINGS)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x250), rng.randrange(0x110000)))) for _ in range(8)
    )


def value(rng: Random) -> Any:
    """Of any kind."""
    kind = rng.randrange(8)
    if kind < 2:
        return number(rng)
    if kind < 4:
        return text(rng)
    if kind == 4:
        return rng.choice((None, True, False, [], {}, [[]], [None], {"": None}))
    if kind == 5:
        return rng.choice(SCHEMAS)
    if kind == 6:
        return nested(rng)
    return rng.choice(([number(rng) for _ in range(4)], [text(rng)] * 40, {text(rng): number(rng)}, [0] * 3000))


def nested(rng: Random) -> Raw:
    """Lists and objects in each other, some without their ends."""
    depth = rng.choice((20, 150, 300, 3000, 20_000))
    unit, end = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    return Raw(unit * depth + "0" + end * (depth if rng.random() < 0.7 else depth // 2))


def encoded(thing: Any, rng: Random) -> bytes:
    """JSON; surrogates without a partner as three bytes each where they are not escaped."""
    is_plain = rng.random() < 0.3
    return _json(thing, is_plain).encode("utf-8", "surrogatepass")


def _json(thing: Any, is_plain: bool) -> str:
    if isinstance(thing, Raw):
        return str(thing)
    if isinstance(thing, dict):
        pairs = (
            f"{json.dumps(str(key), ensure_ascii=not is_plain)}:{_json(each, is_plain)}" for key, each in thing.items()
        )
        return "{" + ",".join(pairs) + "}"
    if isinstance(thing, list):
        return "[" + ",".join(_json(each, is_plain) for each in thing) + "]"
    return json.dumps(thing, ensure_ascii=not is_plain)


def mutated(thing: Any, rng: Random) -> Any:
    """A copy with one change somewhere in it."""
    if isinstance(thing, dict) and thing and rng.random() < 0.85:
        changed = dict(thing)
        key = rng.choice(list(changed))
        act = rng.random()
        if act < 0.08:
            del changed[key]
        elif act < 0.14:
            changed[text(rng)] = value(rng)
        elif act < 0.20:
            changed[key] = changed[rng.choice(list(changed))]
        elif act < 0.23:
            changed[key] = Raw(f"0,{json.dumps(key)}:{_json(changed[key], False)}")
        else:
            changed[key] = mutated(changed[key], rng)
        return changed
    if isinstance(thing, list) and thing and rng.random() < 0.8:
        listed = list(thing)
        index = rng.randrange(len(listed))
        act = rng.random()
        if act < 0.1:
            listed *= rng.choice((0, 2, 50))
        elif act < 0.2:
            listed.insert(index, value(rng))
        else:
            listed[index] = mutated(listed[index], rng)
        return listed
    return rng.choice(
        (value(rng), [thing], {"a": thing}, str(thing), number(rng) if isinstance(thing, int) else text(rng))
    )


def damaged(data: bytes, rng: Random) -> bytes:
    """Bytes with some of them lost, changed, doubled or added."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 7, 60))
        act = rng.randrange(5)
        if act == 0:
            data = data[:start]
        elif act == 1:
            data = data[:start] + data[start + size :]
        elif act == 2:
            data = data[:start] + rng.randbytes(size) + data[start:]
        elif act == 3:
            data = data[:start] + rng.choice(BYTES) + data[start + rng.randrange(2) :]
        else:
            data = data[: start + size] + data[start:]
    return data


BYTES: tuple[bytes, ...] = (
    b"\x00",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf5\x80\x80\x80",
    b"\xe2\x82",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x80",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u",
    b"\\ud800",
    b"\\x00",
    b"//",
    b"1e999",
    b"\r\n",
)
