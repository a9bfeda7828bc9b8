"""One operator per emitted kernel that torch can see through: ``torch.library.triton_op``.

``torch.ops.attnc.attend`` is the front: it runs everywhere, has a gradient, and torch.compile keeps it as one
opaque call.  ``triton_op_for(spec)`` makes ``attnc::attend_<key>`` for what leaves us: torch.compile and
AOTInductor trace it to the launch of the Triton kernel, so that a package needs neither this operator nor
Python.  Its captured tensors are arguments of their own, since an empty list reaches AOTInductor as None.

Eager calls run as those of ``attend`` do.  A traced launch is that of the emitted launcher for one
architecture, and loads by pointers: tensor descriptors need addresses, which tracing does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from attnc import logs
from attnc.codegen.forward_mode import attend_autograd
from attnc.codegen.operators import Below, differentiate
from attnc.codegen.ops import attend_vmap, execute
from attnc.codegen.triton.configs import SHARED_LIMIT
from attnc.codegen.triton.draws import seeds
from attnc.codegen.triton.emit import can_run, emit, kind_of, spec_of
from attnc.codegen.triton.kinds import KINDS
from attnc.codegen.triton.launch import run as run_kernel
from attnc.codegen.triton.store import load_apart
from attnc.errors import CodegenError, UnsupportedError
from attnc.ir import AttentionSpec, Kernel
from attnc.printer import parse

log = logs.get("codegen")

PROCESSORS = 132
"""Streaming multiprocessors of a GPU that is not here; any number gives right results."""

Operator = Callable[..., tuple[Tensor, Tensor]]


def triton_op_for(spec: AttentionSpec, arch: str | None = None) -> Operator:
    """Return the operator of a spec's kernel: ``(q, k, v, *captured) -> (out, lse)``, layouts as ``attend``.

    With dropout it takes the seed last.  It is registered once per kernel and architecture.  ``arch``
    (``sm_90``) is what traced launches are written for; None asks the GPU of the tensors, and there has to be
    one.  Derivatives are those of ``attend``, and so are calls under ``torch.vmap``.

    Raises:
        UnsupportedError: no kernel can serve the spec.
        CodegenError: there is no such architecture.
    """
    miss = can_run(spec)
    if miss is not None:
        raise UnsupportedError(f"triton_op: {miss.why} (in {spec})")
    if arch is not None and arch not in SHARED_LIMIT:
        raise CodegenError(f"triton_op: expected one of {', '.join(SHARED_LIMIT)}, found {arch!r}")
    return _registered(emit(spec, name="attend"), arch)


def replace_attends(graph: fx.Graph, arch: str | None = None) -> dict[str, int]:
    """Replace ``attend`` nodes by operators of their kernels, in place; return how many were and were not.

    A node stays where no kernel can serve it, or its tensors are not of the dtypes and head sizes of its
    spec.  Keys of the result are ``triton`` and ``attend``.
    """
    counts = {"triton": 0, "attend": 0}
    attend = torch.ops.attnc.attend.default
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not attend:
            continue
        q, k, v, captured, text, *seed = node.args
        spec = _with_numbers(parse(str(text)), q, v)
        why = _unfit(spec, (q, k, v))
        if why is None:
            operator: Any = triton_op_for(spec, arch)
            node.target, node.args = operator._opoverload, (q, k, v, *captured, *seed[: len(seeds(spec))])
        else:
            log.warning("%s stays attnc::attend: %s", node.name, why)
        counts["attend" if why else "triton"] += 1
    return counts


def _with_numbers(spec: AttentionSpec, q: fx.Node, v: fx.Node) -> AttentionSpec:
    """Return the spec with the head sizes of its tensors, where it leaves them free."""
    sizes = tuple(n.meta["val"].shape[3] for n in (q, v))
    free = not all(isinstance(o.shape[3], int) for o in (spec.q, spec.v))
    return spec.with_head_sizes(*sizes) if free and all(isinstance(n, int) for n in sizes) else spec


def _unfit(spec: AttentionSpec, nodes: tuple[Any, ...]) -> str | None:
    """Return why an ``attend`` node cannot be the operator of its kernel, or None."""
    miss = can_run(spec)
    if miss is not None:
        return miss.why
    found = [(x.dtype, x.shape[3]) for x in (n.meta["val"] for n in nodes)]
    wanted = [(o.dtype, o.shape[3]) for o in (spec.q, spec.k, spec.v)]
    return None if found == wanted else f"expected dtypes and head sizes {wanted}, found {found}"


@cache
def _registered(kernel: Kernel, arch: str | None) -> Operator:
    """Register the operator of a kernel."""
    from torch.library import triton_op, wrap_triton

    spec, traced = spec_of(kernel.source), _traceable(kernel, arch)
    entry = getattr(traced, f"{kernel.name}_kernel").kernel

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *rest = tensors
        captured, seed = _parted(spec, rest)
        if q.device.type == "cpu":
            return execute(spec, q, k, v, captured, seed=seed)
        if _is_real(q):
            return run_kernel(spec, q, k, v, captured, seed)
        wrap_triton(entry)  # by this line torch knows whose kernels an operator starts
        found: tuple[Tensor, Tensor] = traced.attend(*tensors)
        return found

    names = ("q", "k", "v", *(o.name for o in spec.captured), *seeds(spec))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=Tensor) for name in names]
    run.__signature__ = inspect.Signature(parameters, return_annotation=tuple[Tensor, Tensor])  # type: ignore[attr-defined]
    name = f"attnc::attend_{kernel.key}{f'_{arch}' if arch else ''}"
    operator: Any = triton_op(name, run, mutates_args=())
    operator.register_fake(_fake_of(spec))
    differentiate(operator._opoverload, _derivatives(spec))
    operator.register_vmap(_mapped(spec))
    return operator  # type: ignore[no-any-return]


def _parted(spec: AttentionSpec, rest: Sequence[Any]) -> tuple[list[Any], Any]:
    """Return what belongs to captured tensors, and what to the seed, None without dropout."""
    count = len(spec.captured)
    return list(rest[:count]), rest[count] if spec.dropout else None


def _is_real(x: Tensor) -> bool:
    """Say whether a tensor holds data, and no mode is tracing what is done with it."""
    return type(x) in (Tensor, torch.nn.Parameter)


def _fake_of(spec: AttentionSpec) -> Operator:
    """Return the rule by which the outputs of an operator are known without data."""
    sizes = (spec.q.shape[3], spec.k.shape[3], spec.v.shape[3])

    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        if (q.shape[3], k.shape[3], v.shape[3]) != sizes or q.shape[1] != k.shape[1] * spec.group_size:
            found = [list(x.shape) for x in (q, k, v)]
            raise ValueError(f"expected the heads and head sizes of {spec}, found q, k, v {found}")
        return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)

    return fake


def _derivatives(spec: AttentionSpec) -> Operator:
    """Return what Autograd calls in place of an operator: derivatives are those of ``attend``."""
    text = str(spec)

    def autograd(below: Below, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *rest = tensors
        captured, seed = _parted(spec, rest)

        def run(
            q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], text: str, seed: Tensor | None
        ) -> Any:
            return below(q, k, v, *captured, *([] if seed is None else [seed]))

        return attend_autograd(run, q, k, v, captured, text, seed)

    return autograd


def _mapped(spec: AttentionSpec) -> Callable[..., tuple[tuple[Tensor, Tensor], tuple[int, int]]]:
    text = str(spec)

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        captured, seed = _parted(spec, tensors[3:])
        dims, seed_dim = _parted(spec, in_dims[3:])
        return attend_vmap(info, (*in_dims[:3], dims, None, seed_dim), *tensors[:3], captured, text, seed)

    return rule


def _traceable(kernel: Kernel, arch: str | None) -> ModuleType:
    """Import the emitted file once more, with launches and questions about the GPU that torch can trace."""
    module: Any = load_apart(kernel, f"traced_{arch}")
    for program in KINDS[kind_of(kernel.source)].programs:
        name = f"{kernel.name}_{program.kernel}"
        if not isinstance(getattr(module, name), _Launch):
            setattr(module, name, _Launch(getattr(module, name)))
    module.torch = _Elsewhere(torch, cuda=_Elsewhere(torch.cuda, device_of=lambda x: nullcontext()))
    module.min, module.max = torch.sym_min, torch.sym_max  # of symbolic sizes, without deciding which it is
    module._aligned = lambda x: False
    if arch is not None:
        module._arch, module._processors = lambda q: arch, lambda q: PROCESSORS
    found: ModuleType = module
    return found


class _Launch:
    """A kernel that emitted launchers start as ever, and torch can trace."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        # Other options are for the compiler alone, and torch would take them for arguments.
        self.known = frozenset((*kernel.arg_names, "num_warps", "num_stages"))

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        from torch.library import wrap_triton

        def start(*args: Any, **options: Any) -> None:
            kept = {name: value for name, value in options.items() if name in self.known}
            wrap_triton(self.kernel)[grid](*args, **kept)

        return start


class _Elsewhere:
    """A module with some names replaced: where code is traced, no device is there to be chosen."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
