"""FlexAttention's forward kernel as the installed torch writes it, for a GPU that is not here.

Inductor itself renders its template, score and mask functions included, with the config that it picks by
default for the GPU; nothing of it is copied.  What stands in for the GPU: fake tensors on ``cuda:0``, its
properties and capability, a name for triton's backend.  Inductor is stopped when it has written the kernel,
which is then compiled as Inductor would.  All of this is private to torch: it ran with torch 2.13.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import select_algorithm
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries and keys per entry of a block mask, the default of ``create_block_mask``."""
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
Modifier = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Call:
    """A call of ``flex_attention`` with as many heads in q as in k and v; ``mods`` gets a maker of tensors.

    ``mods`` returns the score function and the mask function, None where there is none.
    """

    batch: int
    heads: int
    length: int
    head: int
    dtype: torch.dtype
    mods: Callable[[Callable[..., torch.Tensor]], tuple[Modifier | None, Modifier | None]]


@dataclass(frozen=True)
class Template:
    """A kernel as Inductor wrote it: its text, and what it would hand to triton beside it."""

    source: str
    target: str
    options: dict[str, Any]
    meta: dict[str, Any]
    fn: Any

    @property
    def tiles(self) -> dict[str, int]:
        """Queries and keys per tile, warps, stages."""
        config = self.meta["config_args"]
        sizes = {"block_m": config["BLOCK_M"], "block_n": config["BLOCK_N"]}
        return sizes | {"warps": self.options["num_warps"], "stages": self.options["num_stages"]}


class _Written(Exception):
    """Inductor has written the kernel."""


def render(call: Call, target: str) -> Template:
    """Return the kernel that Inductor writes for this call on ``target`` (``sm_90``)."""
    sources: list[str] = []

    def keep(source: str, *_: Any, **__: Any) -> None:
        sources.append(source)
        raise _Written

    torch._dynamo.reset()
    with _pretend(target), mock.patch.object(select_algorithm.PyCodeCache, "load", keep):
        try:
            _lower(call)
        except BackendCompilerFailed:
            if not sources:
                raise
    return _load(sources[0], target)


@contextlib.contextmanager
def _pretend(target: str) -> Iterator[None]:
    """Make torch believe in a GPU as far as the flex lowering asks for one."""
    number = int(target.removeprefix("sm_"))
    properties = DeviceProperties(
        type="cuda", index=0, multi_processor_count=MULTIPROCESSORS[target], cc=number, major=number // 10
    )
    stand_ins: dict[str, Any] = {
        "torch.cuda.get_device_capability": lambda *_: divmod(number, 10),
        "torch.utils._triton.triton_hash_with_backend": lambda: target,
        # Two functions that would write to the fake GPU: for the strides of the output, for backward's lists.
        "torch._higher_order_ops.flex_attention._permute_strides": lambda out, _: out,
        "torch.nn.attention.flex_attention._transpose_ordered": lambda *lists: lists,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=properties))
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch(name, value))
        yield


def _lower(call: Call) -> None:
    """Capture the call on fake tensors and lower it, up to the kernel's text."""
    with FakeTensorMode() as mode, torch.no_grad():

        def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda:0")

        def lower(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
            lowering = GraphLowering(graph)
            with V.set_graph_handler(lowering), V.set_fake_mode(mode):
                lowering.run(*inputs)

        q, k, v = (make(call.batch, call.heads, call.length, call.head, dtype=call.dtype) for _ in "qkv")
        score, keep = call.mods(make)
        blocks = None if keep is None else _blocks(call, keep, make)
        backend = aot_autograd(fw_compiler=lower, decompositions=select_decomp_table())
        compiled = torch.compile(flex_attention, backend=backend, fullgraph=True, dynamic=False)
        compiled(q, k, v, score_mod=score, block_mask=blocks, return_lse=True)


def _blocks(call: Call, keep: Modifier, make: Callable[..., torch.Tensor]) -> BlockMask:
    """Return a block mask with full and partial blocks, whose values do not matter here."""
    n = -(-call.length // BLOCK)
    counts = [make(1, 1, n, dtype=torch.int32) for _ in range(2)]
    lists = [make(1, 1, n, n, dtype=torch.int32) for _ in range(2)]
    return BlockMask.from_kv_blocks(
        counts[0],
        lists[0],
        counts[1],
        lists[1],
        BLOCK_SIZE=BLOCK,
        mask_mod=keep,
        seq_lengths=(call.length, call.length),
    )


def _load(source: str, target: str) -> Template:
    """Import the text, with a decorator that keeps what Inductor's own would hand to triton."""
    kept: dict[str, Any] = {}

    def template(**given: Any) -> Callable[[Any], Any]:
        kept.update(given)
        return lambda fn: fn

    folder = tempfile.mkdtemp(prefix="attnc-flex-")  # triton reads the source again when it compiles
    path = Path(folder) / "kernel.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("attnc_flex_kernel", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    with mock.patch("torch._inductor.runtime.triton_heuristics.template", template):
        spec.loader.exec_module(module)
    inductor, meta = kept["inductor_meta"], kept["triton_meta"]
    options = {"num_warps": kept["num_warps"], "num_stages": kept["num_stages"]}
    options |= {"debug": inductor["assert_indirect_indexing"], "sanitize_overflow": False}
    meta |= {"config_args": inductor["config_args"]}
    return Template(source, target, options, meta, module.triton_flex_attention)


def compile_template(template: Template) -> Any:
    """Return triton's compiled kernel, with the options that Inductor passes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    meta = template.meta
    source = ASTSource(
        fn=template.fn,
        signature=meta["signature"],
        constexprs=meta["constants"],
        attrs=meta["configs"][0],
    )
    where = GPUTarget("cuda", int(template.target.removeprefix("sm_")), 32)
    return triton.compile(source, target=where, options={**template.options, "enable_fp_fusion": True})
