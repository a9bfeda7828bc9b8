"""Break a valid ONNX file: in its bytes, or in its fields with all lengths made right again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from tests.codegen.onnx.hostile import varint

NUMBERS = (0, 1, 2, 7, 9, 15, 27, 99, 127, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    b"",
    b"x",
    b"y",
    b"w",
    b"../secret.bin",
    b"/etc/passwd",
    b"link.bin",
    b"linked/secret.bin",
    b"pipe.bin",
    b"hard.bin",
    b"data",
    b"data/../../secret.bin",
    b"w.bin\0",
    b"location",
    b"Location",
    b"offset",
    b"basepath",
    b"-1",
    b"1e3",
    b"99999999999999999999",
    b"9**9**9**9",
    b"\xff\xfe",
    "größe ∞".encode(),
    b"a" * 5000,
    b"ai.onnx",
    b"If",
    b"F",
    b"\x1b[31m\n",
)


@dataclass(slots=True)
class Part:
    """One field: number, wire type, and a value, which is bytes, a number, or the fields of a message."""

    number: int
    wire: int
    value: Any
    kind: str = ""


def parse(data: bytes, message: Any = onnx.ModelProto.DESCRIPTOR) -> list[Part]:
    """Return the fields of a valid message."""
    out, at = [], 0
    inner = {f.number: f.message_type for f in message.fields}
    while at < len(data):
        tag, at = _number(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _number(data, at)
            out.append(Part(number, wire, value))
            continue
        length, at = _number(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
        body: Any = data[at : at + length]
        at += length
        kind = inner.get(number)
        if wire == 2 and kind is not None:
            out.append(Part(number, wire, parse(body, kind), kind.name))
        else:
            out.append(Part(number, wire, body))
    return out


def written(parts: Sequence[Part]) -> bytes:
    """Return the bytes of fields."""
    out = bytearray()
    for p in parts:
        out += varint(p.number << 3 | p.wire)
        if p.wire == 0:
            out += varint(p.value)
            continue
        body = written(p.value) if isinstance(p.value, list) else p.value
        out += (varint(len(body)) if p.wire == 2 else b"") + body
    return bytes(out)


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def messages(parts: list[Part], kind: str = "ModelProto") -> Iterator[tuple[str, list[Part]]]:
    """Give every message with its kind, the outermost first."""
    yield kind, parts
    for p in parts:
        if isinstance(p.value, list):
            yield from messages(p.value, p.kind)


# In the bytes


def flip(data: bytes, others: Sequence[bytes], r: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    return bytes(out)


def overwrite(data: bytes, others: Sequence[bytes], r: random.Random) -> bytes:
    at = r.randrange(len(data))
    new = r.choice((b"\x00", b"\xff", b"\x7f", b"\x80" * 11, varint(r.choice(NUMBERS))))
    return data[:at] + new + data[at + r.choice((0, 1, len(new))) :]


def truncate(data: bytes, others: Sequence[bytes], r: random.Random) -> bytes:
    return data[: r.randrange(len(data))]


def splice(data: bytes, others: Sequence[bytes], r: random.Random) -> bytes:
    other = r.choice(others)
    return data[: r.randrange(len(data))] + other[r.randrange(len(other)) :]


def repeat(data: bytes, others: Sequence[bytes], r: random.Random) -> bytes:
    a, b = sorted((r.randrange(len(data)), r.randrange(len(data))))
    return data[:a] + data[a:b] * r.choice((2, 3, 50)) + data[b:]


def append(data: bytes, others: Sequence[bytes], r: random.Random) -> bytes:
    """Parsers merge two messages in a row."""
    return data + r.choice(others)


# In the fields


Mutation = Callable[[bytes, Sequence[bytes], random.Random], bytes]


def _in_fields(change: Callable[[list[Part], list[Part], str, random.Random], None]) -> Mutation:
    """Make a mutation of bytes from one that changes a message; it also gets a message of the same kind."""

    def mutate(data: bytes, others: Sequence[bytes], r: random.Random) -> bytes:
        try:
            parts = parse(data)
        except (IndexError, OverflowError):  # broken before
            return flip(data, others, r)
        kind, at = r.choice([m for m in messages(parts) if m[1]] or [("ModelProto", parts)])
        same = [m for k, m in messages(parse(r.choice(others))) if k == kind] or [at]
        change(at, r.choice(same), kind, r)
        return written(parts)

    mutate.__name__ = change.__name__.strip("_")
    return mutate


def _copied(part: Part) -> Part:
    return Part(
        part.number,
        part.wire,
        [_copied(p) for p in part.value] if isinstance(part.value, list) else part.value,
        part.kind,
    )


def _duplicate(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    if at:
        at.insert(r.randrange(len(at) + 1), _copied(r.choice(at)))


def _remove(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    if at:
        at.pop(r.randrange(len(at)))


def _shuffle(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    r.shuffle(at)


def _graft(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    if other:
        at.append(_copied(r.choice(other)))


def _renumber(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    if at:
        r.choice(at).number = r.choice((1, 2, 3, 5, 7, 9, 13, 14, 15, 20, 22, 25, 100))


def _set_number(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    found = [p for p in at if p.wire == 0]
    if found:
        r.choice(found).value = r.choice((*NUMBERS, r.randrange(30)))


def _set_text(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    found = [p for p in at if p.wire == 2 and not isinstance(p.value, list)]
    if found:
        part = r.choice(found)
        part.value = r.choice((*TEXTS, part.value + b"\0", part.value[:-1], part.value * 2))


def _rename(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    """Give one text the value of another: names meet that should not."""
    found = [p for p in at if p.wire == 2 and not isinstance(p.value, list)]
    if len(found) > 1:
        r.choice(found).value = r.choice(found).value


def _nest(at: list[Part], other: list[Part], kind: str, r: random.Random) -> None:
    """Put a graph into a node of itself, or a type into a sequence, up to 40 times; another message twice."""
    for _ in range(r.choice((1, 2, 40))):
        inner = list(at)
        if kind == "GraphProto":
            held = [Part(1, 2, b"then_branch"), Part(20, 0, 5), Part(6, 2, inner, kind)]
            node = [Part(4, 2, b"If"), Part(1, 2, b"c"), Part(5, 2, held, "AttributeProto")]
            at[:] = [*(p for p in inner if p.number != 1), Part(1, 2, node, "NodeProto")]
        elif kind == "TypeProto":
            at[:] = [Part(4, 2, [Part(1, 2, inner, kind)], "Sequence")]
        else:
            at.extend(inner if len(inner) < 1000 else ())


MUTATIONS: tuple[Mutation, ...] = (
    flip,
    overwrite,
    truncate,
    splice,
    repeat,
    append,
    *(
        _in_fields(f)
        for f in (
            _duplicate,
            _remove,
            _shuffle,
            _graft,
            _renumber,
            _set_number,
            _set_text,
            _set_text,
            _rename,
            _nest,
        )
    ),
)


def mutated(seed: int, models: Sequence[bytes]) -> tuple[bytes, str]:
    """Return one broken file and the names of what was done to it; the same for the same seed."""
    r = random.Random(seed)
    data, names = r.choice(models), []
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        change = r.choice(MUTATIONS)
        data = change(data, models, r) or b"\0"
        names.append(change.__name__)
    return data[: 1 << 22], " + ".join(names)
