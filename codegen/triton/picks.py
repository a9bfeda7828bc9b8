"""Keep what tuning found, one small file per key beside the kernels, and find it again.

A key names all that a pick depends on: GPU, kind of kernel, dtype, head sizes, the structure of mask and
steps without their numbers, lengths in powers of two, the version of triton, and a digest of the code that
writes kernels.  The file is named by the key, written whole and compared when it is read, so several
processes may tune at once, and a new version or template finds nothing instead of something old.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnc import logs
from attnc.codegen.triton import store
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.configs import CAPABILITIES, UNKNOWN, Config
from attnc.ir import AttentionSpec

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

log = logs.get("codegen")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a kernel runs, and at which lengths: those up to the next power of two are taken as one."""

    arch: str
    device: str
    sq: int
    sk: int


def place_of(q: Tensor, k: Tensor) -> Place:
    """Return the place of a call with q ``[B, H, Sq, Dqk]`` and k ``[B, Hkv, Sk, Dqk]``."""
    return Place(*_hardware(q.device), bucket(q.shape[2]), bucket(k.shape[2]))


def bucket(length: int) -> int:
    """Return the power of two at or above ``length``, in tokens."""
    return 1 << (max(length, 1) - 1).bit_length()


@cache
def _hardware(device: torch.device) -> tuple[str, str]:
    """Return the architecture, as emitted files name it, and the device's own name."""
    if device.type == "cpu":
        return "interpreter", "cpu"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return "gfx942", name
    return CAPABILITIES.get(torch.cuda.get_device_capability(device), UNKNOWN), name


def folder() -> Path:
    """Return where picks are kept; it may not exist yet."""
    return store.folder() / "picks"


def find(spec: AttentionSpec, kind: str, place: Place) -> Config | None:
    """Return what tuning picked for such a spec at this place, or None; a broken file counts as none."""
    wanted = key(spec, kind, place)
    path = _path(wanted)
    try:
        return _read(path.read_text(encoding="utf-8"), wanted)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: expected a pick of attnc, found %s; the default tiles are used", path, error)
        return None


def keep(spec: AttentionSpec, kind: str, place: Place, config: Config, **measured: float) -> Path | None:
    """Write a pick and what was measured of it, milliseconds by name; return the path, None if it cannot be.

    A later pick of the same key takes its place.
    """
    wanted = key(spec, kind, place)
    path = _path(wanted)
    text = json.dumps({"key": wanted, "config": astuple(config), "ms": measured}, indent=1, sort_keys=True)
    try:
        store.write(path, text + "\n")
    except OSError as error:
        log.warning("cannot keep picks in %s (%s); the next process tunes again", folder(), error)
        return None
    return path


def key(spec: AttentionSpec, kind: str, place: Place) -> dict[str, Any]:
    """Return everything that a pick depends on."""
    import triton

    own = canonical(spec)
    return {
        "arch": place.arch,
        "device": place.device,
        "kind": kind,
        "dtype": str(own.q.dtype).removeprefix("torch."),
        "head_sizes": [own.q.shape[3], own.v.shape[3]],
        "group": own.group_size,
        "steps": [_without_numbers(step) for step in own.scores],
        "mask": _without_numbers(own.mask),
        "fill": _without_numbers(own.fill),
        "norm": _without_numbers(own.norm),
        "inputs": [str(operand) for operand in own.captured],
        "lengths": [place.sq, place.sk],
        "triton": triton.__version__,
        "templates": digest(),
    }


def _without_numbers(part: object) -> str:
    """Return a part of a spec as text with ``#`` for each number; digits that end a name stay."""
    return re.sub(r"(?<![\w.])-?\d+(\.\d+)?(e[+-]?\d+)?", "#", str(part))


@cache
def digest() -> str:
    """Return a digest of the templates and the code that fills them."""
    found = hashlib.sha256()
    for name, data in sorted(_files(resources.files("attnc.codegen.triton"))):
        found.update(f"{name} {len(data)} ".encode() + data)
    return found.hexdigest()[:16]


def _files(place: Traversable) -> Iterator[tuple[str, bytes]]:
    for entry in place.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        elif entry.name.endswith((".py", ".j2")):
            yield entry.name, entry.read_bytes()


def _path(wanted: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"{wanted['kind']}_{wanted['arch']}_{name}.json"


def _read(text: str, wanted: dict[str, Any]) -> Config:
    """Return the pick in a file.

    Raises:
        ValueError: the text is no pick, or one of another key.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("key") != wanted:
        raise ValueError("another key")
    numbers = found.get("config")
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_fits, numbers)):
        raise ValueError(f"the tiles {numbers}")
    return Config(*numbers)


def _fits(number: object) -> bool:
    return type(number) is int and 0 < number <= 1024
