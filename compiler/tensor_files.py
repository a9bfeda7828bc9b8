"""Read and write safetensors; every header is checked against its file before a byte of it is used.

Layout: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the
tensors' bytes without holes.  A checkpoint is one ``model.safetensors`` or shards listed in
``model.safetensors.index.json``. Source: the format description of the safetensors project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from attnc.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
SHARD_BYTES = 5_000_000_000
# fmt: off
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}
NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.int64: "I64", torch.float64: "F64",
    torch.complex64: "C64",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: its file, its dtype in the format's words, its shape, its first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of one file; each is checked to lie inside it and to be as long as its shape says.

    Raises:
        CheckpointError: truncated, not safetensors, offsets outside the file, overlapping or leaving holes.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(HEADER_LIMIT, size - 8):
            raise _broken(
                path,
                f"expected a header of {length} bytes, found a file of {size} bytes; it is truncated or not "
                "safetensors",
            )
        text = f.read(length)
    try:
        header = json.loads(text)
    except ValueError as e:  # also a UnicodeDecodeError
        raise _broken(path, f"the header is not JSON ({e}); the file is corrupt") from None
    if not isinstance(header, dict):
        raise _broken(path, f"expected a JSON object as header, found {type(header).__name__}")
    room = size - 8 - length
    entries = {
        name: _entry(path, name, value, room) for name, value in header.items() if name != "__metadata__"
    }
    _check_layout(path, entries, room)
    return entries


def read_checkpoint(folder: Path) -> dict[str, Entry]:
    """Return all tensors of a checkpoint folder, single file or shards.

    Raises:
        CheckpointError: no weights, an index that names missing files or tensors, or a broken file.
    """
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    raise CheckpointError(f"opening {folder}: expected {WEIGHTS} or {INDEX}, found neither")


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors into ``folder``: one file, or shards of at most ``shard_bytes``, tensor by tensor.

    The same tensors give the same bytes: shards are filled in the order given, and inside a file wide types
    come first, then names.

    Raises:
        CheckpointError: a dtype that the format does not have.
        OSError: the file system refused.
    """
    shards = _split(tensors, shard_bytes)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "xb") as f:
            _write_shard(f, shard)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def stream_tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors one at a time, file by file.

    Raises:
        CheckpointError: the library cannot read a file whose header was sound.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted({e.file for e in entries.values()}):
        try:
            with safe_open(file, framework="pt", device="cpu") as f:
                for name in (n for n, e in entries.items() if e.file == file):
                    yield name, f.get_tensor(name)
        except SafetensorError as e:
            raise _broken(file, str(e)) from e


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"reading {path}: {why}")


def _entry(path: Path, name: str, value: Any, room: int) -> Entry:
    """Read one line of a header."""
    where = f"tensor {name!r}: "
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _broken(
            path, f"{where}expected dtype, shape and data_offsets, found {str(value)[:80]}"
        ) from None
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise _broken(
            path, f"{where}expected sizes and offsets >= 0, found shape {shape}, offsets {begin}, {end}"
        )
    if dtype not in BITS:
        raise _broken(path, f"{where}expected one of the dtypes {', '.join(BITS)}, found {dtype!r}")
    if not begin <= end <= room:
        raise _broken(
            path,
            f"{where}expected its bytes {begin} to {end} inside {room} bytes of data; the file is truncated "
            "or corrupt",
        )
    need = math.prod(shape) * BITS[dtype] // 8
    if end - begin != need:
        raise _broken(path, f"{where}expected {need} bytes for {dtype} {list(shape)}, found {end - begin}")
    return Entry(path, dtype, shape, begin, end)


def _check_layout(path: Path, entries: Mapping[str, Entry], room: int) -> None:
    """Check that the tensors tile the data: no overlap, no hole, nothing after the last."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _broken(
                path, f"tensor {name!r}: expected it to begin at byte {at} of the data, found {entry.begin}"
            )
        at = entry.end
    if at != room:
        raise _broken(path, f"expected {at} bytes of data, found {room}; the file is truncated or corrupt")


def _read_shards(folder: Path) -> dict[str, Entry]:
    index = read_json(folder / INDEX)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(v, str) and Path(v).name == v for v in where.values()
    ):
        raise _broken(folder / INDEX, "expected a weight_map from tensor names to names of files beside it")
    shards: dict[str, dict[str, Entry]] = {}
    for name in sorted(set(where.values())):
        if not (folder / name).is_file():
            raise _broken(folder / INDEX, f"it lists the shard {name}, which is not there")
        shards[name] = read_header(folder / name)
    for tensor, name in where.items():
        if tensor not in shards[name]:
            raise _broken(
                folder / name, f"expected the tensor {tensor!r} as {INDEX} says, found no such tensor"
            )
    return {tensor: shards[name][tensor] for tensor, name in where.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _broken(path, f"expected a JSON file: {e}") from None
    if not isinstance(value, dict):
        raise _broken(path, f"expected a JSON object, found {type(value).__name__}")
    return value


def _split(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _write_shard(f: BinaryIO, shard: Mapping[str, torch.Tensor]) -> None:
    """Write one file: header padded to 8 bytes, then the tensors, widest types first to keep them aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(shard, key=lambda name: (-shard[name].element_size(), name))
    at = 0
    for name in order:
        tensor = shard[name]
        if tensor.dtype not in NAMES:
            raise CheckpointError(
                f"writing tensor {name!r}: expected a dtype that safetensors has, found {tensor.dtype}"
            )
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        plain = shard[name].detach().cpu().contiguous()
        if plain.numel():  # a view as bytes needs at least one element in its last axis
            f.write(plain.view(-1).view(torch.uint8).numpy().data)
