"""Write a mask as basic ONNX operators: bool, broadcasts to ``[B, H, Sq, Sk]``, True where visible.

Sizes are read at run time, so one text serves all lengths.  The meaning is that of ``Mask.keep`` in
``attnc.masks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from attnc.codegen.onnx.builder import Builder
from attnc.codegen.onnx.formulas import Operators
from attnc.errors import CodegenError
from attnc.formula import fold
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range

if TYPE_CHECKING:
    import onnx_ir as ir


def keep(b: Builder, mask: Mask, q: ir.Value, k: ir.Value, captured: Mapping[str, ir.Value]) -> ir.Value:
    """Write ``mask`` for scores of q ``[B, H, Sq, D]`` and k ``[B, Hkv, Sk, D]``.

    Raises:
        CodegenError: an atom without an ONNX text.
    """
    if isinstance(mask, And | Or):
        parts = [keep(b, p, q, k, captured) for p in mask.parts]
        out = parts[0]
        for p in parts[1:]:
            out = b.op("And" if isinstance(mask, And) else "Or", out, p, dtype=torch.bool)
        return out
    if isinstance(mask, Not):
        return b.op("Not", keep(b, mask.part, q, k, captured), dtype=torch.bool)
    if isinstance(mask, Band):
        return _band(b, mask, q, k)
    if isinstance(mask, Range):
        return _range(b, mask, q, k)
    if isinstance(mask, Padding):
        row = b.cast(captured[mask.operand], torch.bool)
        return b.op("Unsqueeze", row, b.ints(1, 2) if mask.axis == "k" else b.ints(1, 3), dtype=torch.bool)
    if isinstance(mask, Dense):
        return b.cast(captured[mask.operand], torch.bool)
    if isinstance(mask, Formula):
        return fold(mask.value, Operators(b, q, k, captured))
    if isinstance(mask, Full):
        return b.op("Unsqueeze", b.const([1], torch.bool), b.ints(0, 1, 2), dtype=torch.bool)
    raise CodegenError(f"ONNX export: no operators are known for the mask {mask}")


def _positions(b: Builder, size: ir.Value) -> ir.Value:
    """Write ``0 .. size-1`` as int64."""
    zero, one = b.const(0, torch.int64), b.const(1, torch.int64)
    return b.op("Range", zero, b.scalar(size), one, dtype=torch.int64)


def _band(b: Builder, mask: Band, q: ir.Value, k: ir.Value) -> ir.Value:
    """Write ``-right <= p - k <= left`` as ``[1, 1, Sq, Sk]``."""
    sq, sk = b.size(q, 2), b.size(k, 2)
    p = _positions(b, sq)
    if mask.align == "end":
        p = b.op("Add", p, b.op("Sub", sk, sq, dtype=torch.int64), dtype=torch.int64)
    p = b.op("Unsqueeze", p, b.ints(0, 1, 3), dtype=torch.int64)
    d = b.op(
        "Sub", p, b.op("Unsqueeze", _positions(b, sk), b.ints(0, 1, 2), dtype=torch.int64), dtype=torch.int64
    )
    bounds = []
    if mask.left is not None:
        bounds.append(b.op("LessOrEqual", d, b.const(mask.left, torch.int64), dtype=torch.bool))
    if mask.right is not None:
        bounds.append(b.op("GreaterOrEqual", d, b.const(-mask.right, torch.int64), dtype=torch.bool))
    if not bounds:
        return b.op("Equal", d, d, dtype=torch.bool)
    return bounds[0] if len(bounds) == 1 else b.op("And", *bounds, dtype=torch.bool)


def _range(b: Builder, mask: Range, q: ir.Value, k: ir.Value) -> ir.Value:
    """Write ``lo <= x < hi`` as ``[1, 1, 1, Sk]`` or ``[1, 1, Sq, 1]``."""
    x = _positions(b, b.size(k if mask.axis == "k" else q, 2))
    low = b.op("GreaterOrEqual", x, b.const(mask.lo, torch.int64), dtype=torch.bool)
    both = b.op(
        "And", low, b.op("Less", x, b.const(mask.hi, torch.int64), dtype=torch.bool), dtype=torch.bool
    )
    return b.op("Unsqueeze", both, b.ints(0, 1, 2) if mask.axis == "k" else b.ints(0, 1, 3), dtype=torch.bool)
