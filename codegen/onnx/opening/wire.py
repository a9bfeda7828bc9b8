"""Walk the bytes of an ONNX file before a parser sees them: lengths, nesting, text, memory.

A file is a protobuf message: fields of a number, a wire type and a value, some of which are messages again.
A few bytes can stand for an object of kilobytes, so the walk adds up what the objects will take and gives up
where that is out of proportion.  Which fields there are comes from onnx's own descriptors.
Source: protobuf.dev, Encoding; onnx.proto.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from attnc.errors import CheckpointError

LARGEST = 2**31 - 1
"""A protobuf message has at most so many bytes."""
NUMBERS = 1 << 29
"""Numbers of fields are smaller."""
DEPTH = 100
"""Messages inside messages: what protobuf's own parsers allow."""
FIELDS = 3_000_000
"""A model of 50,000 nodes with shapes and five entries of metadata each has about 1.5 million."""
MEMORY = 256 << 20
"""Bytes that objects may take beside the file's bytes and a copy of them."""
OBJECT = {
    "NodeProto": 900,
    "ValueInfoProto": 700,
    "TensorProto": 1700,
    "AttributeProto": 500,
    "GraphProto": 4000,
    "FunctionProto": 5000,
    "TypeProto": 120,
    "Tensor": 120,
    "TensorShapeProto": 120,
    "Dimension": 200,
    "StringStringEntryProto": 120,
}
"""Bytes of the objects for one message: measured with onnx 1.23 and onnx-ir 1.1; more where one is slow."""
SMALL = 250
"""Bytes for a message of any other kind."""
NAME = 100
"""Bytes for one text beside its characters."""
EDGE = {"input": 250, "output": 500}
"""Bytes for the name of a node's input, a use of a value, and of its output, a value."""
NUMBER = 48
"""Bytes for a number in an attribute, which becomes a Python object."""
TEXT = 16 << 20
"""A name, a doc string or a text attribute has at most so many bytes."""

SHOWN = 200
"""What a file holds is cut at so many characters where it is printed."""

Kind = Literal["message", "text", "bytes", "number"]
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class _Field:
    """One field of a message: its wire type, and the bytes that one value of it takes in memory."""

    name: str
    kind: Kind
    wire: int
    repeated: bool
    cost: int
    inner: Any = None


@dataclass(slots=True)
class _Open:
    """A message that the walk is inside of."""

    name: str
    fields: dict[int, _Field]
    end: int
    seen: set[int] = field(default_factory=set)


def scan(data: bytes) -> None:
    """Check that ``data`` is a well-formed ``ModelProto`` whose objects fit into the memory allowed.

    Raises:
        CheckpointError: a length beyond its message, a broken number, text that is not UTF-8, a field twice
            that may be there once, too deep nesting, too many fields, too much memory.
    """
    import onnx

    model = onnx.ModelProto.DESCRIPTOR
    stack = [_Open(model.name, _fields(model), len(data))]
    at = fields = memory = 0
    while stack:
        top = stack[-1]
        if at >= top.end:
            stack.pop()
            continue
        start, tag = at, data[at]
        tag, at = (tag, at + 1) if tag < 128 else _varint(data, at, top)
        known, wire = top.fields.get(tag >> 3), tag & 7
        fields += 1
        if known is None:
            if not 0 < tag >> 3 < NUMBERS:
                raise _broken(start, f"field number {tag >> 3} in {top.name}")
            at = _skip(data, at, wire, top, start)
        elif wire == _LENGTH and known.inner is not None:
            at, end = _length(data, at, known, top, start)
            if len(stack) >= DEPTH:
                raise _broken(start, f"messages are nested more than {DEPTH} deep")
            stack.append(_Open(known.inner.name, _fields(known.inner), end))
            memory += known.cost
        elif wire == _LENGTH and (known.wire == _LENGTH or known.repeated):
            at, end = _length(data, at, known, top, start)
            memory += _content(data, at, end, known, top)
            at = end
        elif wire == known.wire:
            at = _skip(data, at, wire, top, start)
            memory += known.cost
        else:
            raise _broken(start, f"{top.name}.{known.name} has wire type {wire}, not {known.wire}")
        if known is not None and not known.repeated:
            if tag in top.seen:
                raise _broken(start, f"{top.name}.{known.name} is there twice")
            top.seen.add(tag)
        if fields > FIELDS or memory > MEMORY:
            raise _too_much(at, fields, memory)


def _length(data: bytes, at: int, known: _Field, top: _Open, start: int) -> tuple[int, int]:
    """Return where a value that says its length begins and ends."""
    length = data[at] if at < top.end else 128
    length, at = (length, at + 1) if length < 128 else _varint(data, at, top)
    if at + length > top.end:
        raise _broken(
            start,
            f"{top.name}.{known.name} is said to have {length} bytes, {top.end - at} are left; the file is "
            "truncated or corrupt",
        )
    return at, at + length


def _content(data: bytes, at: int, end: int, known: _Field, top: _Open) -> int:
    """Check one text, bytes or packed numbers; return the memory they take."""
    if known.kind == "text" or (known.kind == "bytes" and top.name == "AttributeProto"):
        return known.cost + _text(data, at, end, known, top)
    if known.kind == "bytes":
        return known.cost
    if known.wire == _VARINT:
        if end > at and data[end - 1] >= 128:
            raise _broken(at, f"{top.name}.{known.name} ends within a number")
        return known.cost * int(np.count_nonzero(np.frombuffer(data, np.int8, end - at, at) >= 0))
    width = 8 if known.wire == _FIXED64 else 4
    if (end - at) % width:
        raise _broken(at, f"{top.name}.{known.name} has {end - at} bytes for numbers of {width}")
    return known.cost * ((end - at) // width)


def _text(data: bytes, at: int, end: int, known: _Field, top: _Open) -> int:
    """Check length and encoding of one text; return the memory that it takes beyond a byte per character."""
    if end - at > TEXT:
        raise _broken(at, f"{top.name}.{known.name} has {end - at:,} bytes of at most {TEXT:,}")
    raw = data[at:end]
    if raw.isascii():
        return 0
    if known.kind == "text":
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _broken(at, f"{top.name}.{known.name} is not UTF-8 text") from None
    return 3 * len(raw)


def _skip(data: bytes, at: int, wire: int, top: _Open, start: int) -> int:
    """Return where a field's value ends."""
    if wire == _VARINT:
        return _varint(data, at, top)[1]
    if wire == _LENGTH:
        length, at = _varint(data, at, top)
    elif wire in (_FIXED64, _FIXED32):
        length = 8 if wire == _FIXED64 else 4
    else:
        raise _broken(start, f"wire type {wire}, which ONNX does not use")
    if at + length > top.end:
        raise _broken(
            start, f"a field of {length} bytes, {top.end - at} are left; the file is truncated or corrupt"
        )
    return at + length


def _varint(data: bytes, at: int, top: _Open) -> tuple[int, int]:
    """Return the number at ``at`` and where it ends."""
    value = 0
    for i in range(min(10, top.end - at)):
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise _broken(at, f"a number in {top.name} does not end; the file is truncated or corrupt")


def _broken(at: int, why: str) -> CheckpointError:
    return CheckpointError(f"expected an ONNX model; at byte {at}: {why}")


def quoted(text: object) -> str:
    """Return something found in a file as it is printed: on one line, and not too long."""
    shown = repr(text)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}...{shown[0] if isinstance(text, str) else ''}"


def _too_much(at: int, fields: int, memory: int) -> CheckpointError:
    return CheckpointError(
        f"expected a model of at most {FIELDS:,} fields whose objects take at most {MEMORY >> 20} MiB, found "
        f"{fields:,} fields and {memory >> 20} MiB up to byte {at}; the file is corrupt or made to exhaust "
        "memory"
    )


@functools.cache
def _fields(message: Any) -> dict[int, _Field]:
    """Return the fields of a message type by number."""
    return {f.number: _field(f, message.name) for f in message.fields}


def _field(f: Any, message: str) -> _Field:
    repeated = f.is_repeated if hasattr(f, "is_repeated") else f.label == f.LABEL_REPEATED  # protobuf < 6.31
    if f.type == f.TYPE_MESSAGE:
        cost = OBJECT.get(f.message_type.name, SMALL)
        return _Field(f.name, "message", _LENGTH, repeated, cost, f.message_type)
    if f.type in (f.TYPE_STRING, f.TYPE_BYTES):
        cost = EDGE.get(f.name, NAME) if message == "NodeProto" else NAME
        return _Field(f.name, "text" if f.type == f.TYPE_STRING else "bytes", _LENGTH, repeated, cost)
    wide = f.cpp_type in (f.CPPTYPE_INT64, f.CPPTYPE_UINT64, f.CPPTYPE_DOUBLE)
    fixed = {f.TYPE_FLOAT: _FIXED32, f.TYPE_DOUBLE: _FIXED64}.get(f.type)
    cost = NUMBER if message == "AttributeProto" else 0 if fixed else 8 if wide else 4
    return _Field(f.name, "number", fixed or _VARINT, repeated, cost)
