"""Make torch's own fused attention calls into attend nodes, so that they become operators of the target too.

``optimize`` leaves ``scaled_dot_product_attention`` alone where its mask has no better form: in PyTorch there
is nothing to gain.  In a file there is, since torch's exporter writes such a call as basic operators.  What
the call computes is in its documentation and needs no detection: ``softmax(scale * q k^T, masked or biased)
v``, where a query that sees no key gets zeros.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnc.editing import Builder
from attnc.ir import AttentionSpec, Bias, Fill, Operand, Scale, Softmax, Step
from attnc.masks import CAUSAL, FULL, Dense, Mask
from attnc.programs import copy_program, fix_outputs

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def attend_natively(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with an attend node for each call of SDPA that says all there is to know.

    Left as they are: calls with dropout, with other ranks than 4, with sizes that broadcast, and with a mask
    and ``is_causal`` at once, which SDPA refuses.
    """
    if not any(n.target is _SDPA for n in program.graph.nodes):
        return program
    copied = copy_program(program)
    graph = copied.graph
    builder = Builder(graph)
    for node in [n for n in graph.nodes if n.target is _SDPA]:
        call = _Call(node)
        if call.fits:
            _replace(builder, node, call)
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:  # SDPA lays its result out as q is, attend does not
            node.target = torch.ops.aten.reshape.default
    graph.eliminate_dead_code()
    fix_outputs(copied)
    copied.graph_module.recompile()
    return copied


class _Call:
    """The arguments of one call by name."""

    def __init__(self, node: fx.Node) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        self.q, self.k, self.v = (given[n] for n in names[:3])
        self.mask: Any = given.get("attn_mask")
        self.dropout: Any = given.get("dropout_p", 0.0)
        self.is_causal, self.enable_gqa = (bool(given.get(n, False)) for n in ("is_causal", "enable_gqa"))
        self.scale: Any = given.get("scale")

    @property
    def fits(self) -> bool:
        """Whether the call is plain attention of 4-D tensors of equal sizes."""
        if self.dropout != 0.0 or (self.is_causal and self.mask is not None):
            return False
        q, k, v = (_shape(x) for x in (self.q, self.k, self.v))
        if not len(q) == len(k) == len(v) == 4 or (k[1], q[3]) != (v[1], k[3]):
            return False
        if not all(_alike(a, b) for a, b in ((q[0], k[0]), (q[0], v[0]), (k[2], v[2]))):
            return False
        heads, shared = q[1], k[1]
        if not isinstance(heads, int) or not isinstance(shared, int) or not isinstance(q[3], int):
            return False
        grouped = heads == shared or (self.enable_gqa and heads % shared == 0)
        return grouped and (self.mask is None or self._mask_fits((*q[:3], k[2])))

    def _mask_fits(self, scores: tuple[int | str, ...]) -> bool:
        shape = _shape(self.mask)
        tail = scores[4 - len(shape) :] if len(shape) <= 4 else ()
        return bool(tail) and all(n == 1 or _alike(n, m) for n, m in zip(shape, tail, strict=True))

    def spec(self, axes: tuple[int | str, ...]) -> AttentionSpec:
        """Return what the call computes; ``axes`` are the sizes of the mask as ``[B, H, Sq, Sk]``."""
        q = Operand("q", "bhqd", _shape(self.q), _dtype(self.q))
        k = Operand("k", "bhkd", _shape(self.k), _dtype(self.k))
        v = Operand("v", "bhke", _shape(self.v), _dtype(self.v))
        size = q.shape[3]
        assert isinstance(size, int), "fits asks for a fixed head size"
        steps: list[Step] = [Scale(size**-0.5 if self.scale is None else float(self.scale))]
        mask: Mask = CAUSAL if self.is_causal else FULL
        captured: tuple[Operand, ...] = ()
        if self.mask is not None:
            captured = (Operand("c0", "bhqk", axes, _dtype(self.mask)),)
            if captured[0].dtype == torch.bool:
                mask = Dense("c0")
            else:
                steps.append(Bias("c0"))
        group = int(q.shape[1]) // int(k.shape[1])
        return AttentionSpec(q, k, v, group, tuple(steps), mask, Fill(), Softmax(safe=True), captured)


def _replace(b: Builder, node: fx.Node, call: _Call) -> None:
    b.before(node, {"match": _module(node)})
    captured: list[fx.Node] = []
    if call.mask is not None:
        mask = call.mask
        for _ in range(4 - len(_shape(mask))):
            mask = b.call(torch.ops.aten.unsqueeze.default, mask, 0)
        captured.append(mask)
    axes = _shape(captured[0]) if captured else ()
    attend = b.call(torch.ops.attnc.attend.default, call.q, call.k, call.v, captured, str(call.spec(axes)))
    node.replace_all_uses_with(b.call(operator.getitem, attend, 0))
    b.graph.erase_node(node)


def _module(node: fx.Node) -> str:
    """Return the path of the module that made the call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return str(path).removeprefix("L['self'].") or node.name


def _alike(a: int | str, b: int | str) -> bool:
    """Say whether two sizes are equal wherever the call is valid; free sizes do not broadcast."""
    return a == b or (isinstance(a, str) and isinstance(b, str))


def _shape(node: fx.Node) -> tuple[int | str, ...]:
    return tuple(n if isinstance(n, int) else str(n).replace(" ", "") for n in node.meta["val"].shape)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
