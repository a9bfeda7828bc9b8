"""A kind of kernel: how the queries and keys of a spec are visited, and what is computed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.holes import argument_types
from attnc.ir import AttentionSpec, Miss

Configs = dict[str, Config]
"""Tiles by architecture: ``sm_80``, ``sm_86``, ``sm_90``, ``sm_100``, ``gfx942``, ``interpreter``."""
Types = tuple[dict[str, str], dict[str, int]]
"""Triton's type of each run-time argument, and the strides that are 1 in a packed tensor."""


@dataclass(frozen=True, slots=True)
class Program:
    """One entry point of an emitted file: a Triton kernel that the file's launcher starts.

    ``kernel`` ends its name, after the file's own.  ``configs`` names the table of its tiles in the file, and
    ``constants`` are the compile-time arguments beside ``BLOCK_M`` and ``BLOCK_N``, as a GPU gets them.
    """

    kernel: str = "kernel"
    configs: str = "CONFIGS"
    constants: Mapping[str, Any] = field(default_factory=lambda: {"UPCAST": False})


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file that ``emit`` writes.

    ``template`` lies in ``templates/``; ``choose`` gives the default tiles of a canonical spec and ``fill``
    the value of each hole; ``obstacles`` yields what stands against it beside what no kernel can do, for a
    spec and the node to blame.  ``programs`` are its kernels and ``types`` names what they take.
    """

    name: str
    template: str
    choose: Callable[[AttentionSpec], Configs]
    fill: Callable[[AttentionSpec, Configs], dict[str, Any]]
    obstacles: Callable[[AttentionSpec, str], Iterator[Miss]] = lambda spec, node: iter(())
    programs: tuple[Program, ...] = (Program(),)
    types: Callable[[AttentionSpec], Types] = argument_types
