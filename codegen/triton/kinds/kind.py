"""A kind of kernel: how the queries and keys of a spec are visited, and what is computed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.holes import argument_types
from attnc.ir import AttentionSpec, Elementwise, Miss, SignedSoftmax, Softmax

Configs = dict[str, Config]
"""Tiles by architecture: ``sm_80``, ``sm_86``, ``sm_90``, ``sm_100``, ``gfx942``, ``interpreter``."""
Types = tuple[dict[str, str], dict[str, int]]
"""Triton's type of each run-time argument, and the strides that are 1 in a packed tensor."""


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""The GPUs that every kernel is compiled for."""


@dataclass(frozen=True, slots=True)
class Program:
    """One way to compile an entry point of an emitted file: a Triton kernel that the file's launcher starts.

    ``kernel`` ends the entry point's name, after the file's own.  ``configs`` names the table of its tiles in
    the file, ``constants`` are the compile-time arguments beside ``BLOCK_M`` and ``BLOCK_N`` as a GPU of
    ``targets`` gets them, ``variant`` tells the ways apart.
    """

    kernel: str = "kernel"
    configs: str = "CONFIGS"
    constants: Mapping[str, Any] = field(default_factory=lambda: {"UPCAST": False})
    targets: tuple[str, ...] = TARGETS
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file that ``emit`` writes.

    ``template`` lies in ``templates/``; ``choose`` gives the default tiles of a canonical spec and ``fill``
    the value of each hole; ``obstacles`` yields what stands against it beside what no kernel can do, for a
    spec and the node to blame.  ``norms`` are the normalizers whose weights it computes, and ``places`` the
    positions that its expressions and masks may compute with (``head`` and ``batch`` in its tile).  ``mixed``
    says that values may be in half precision beside queries and keys in fp32, ``dropout`` that weights may be
    dropped.  ``bench`` gives the queries
    and keys with which a file times itself, None where it does not.  ``types`` names what its kernels take.
    ``more`` are programs that only some specs have.
    """

    name: str
    template: str
    choose: Callable[[AttentionSpec], Configs]
    fill: Callable[[AttentionSpec, Configs], dict[str, Any]]
    obstacles: Callable[[AttentionSpec, str], Iterator[Miss]] = lambda spec, node: iter(())
    programs: tuple[Program, ...] = (Program(),)
    norms: tuple[type, ...] = (Softmax, SignedSoftmax, Elementwise)
    places: str = "qk"
    mixed: bool = False
    dropout: bool = False
    bench: tuple[int, int] | None = None
    types: Callable[[AttentionSpec], Types] = argument_types
    more: Callable[[AttentionSpec], tuple[Program, ...]] = lambda spec: ()
