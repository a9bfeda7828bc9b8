"""Lay operands out as the contrib operators want them: heads side by side, ``[B, S, H * D]``.

What the graph did before and after to have them apart is undone and not repeated, and the biases of the
projections, which MultiHeadAttention adds itself, are taken off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from attnc.codegen.onnx.builder import Builder
from attnc.codegen.onnx.sites import Call

if TYPE_CHECKING:
    import onnx_ir as ir


def heads_of(call: Call) -> tuple[int, int, int]:
    """Return the heads of q, k and v."""
    h, hkv, _, _ = call.numbers
    return h, hkv, hkv


def sizes_of(call: Call) -> tuple[int, int, int]:
    """Return the sizes of a head of q, k and v."""
    _, _, dqk, dv = call.numbers
    return dqk, dqk, dv


def packed(b: Builder, x: ir.Value, count: int, size: int) -> ir.Value:
    """Return ``[B, H, S, D]`` as ``[B, S, H * D]``: what it was unpacked from where the graph shows it."""
    node = x.producer()
    if node is not None and node.op_type == "Transpose" and node.domain == "" and _perm(node) == [0, 2, 1, 3]:
        y = node.inputs[0]
        assert y is not None, "a Transpose has an input"
    else:
        y = b.op("Transpose", x, perm=[0, 2, 1, 3])
    node = y.producer()
    if node is not None and node.op_type == "Reshape" and node.domain == "":
        source = node.inputs[0]
        if source is not None and _merges(source, y, count, size):
            return source
    return b.op("Reshape", y, b.ints(0, 0, count * size))


def _perm(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("perm")
    return None if attribute is None else list(attribute.as_ints())


def _merges(packed_: ir.Value, parted: ir.Value, count: int, size: int) -> bool:
    """Say whether ``packed_`` ``[B, S, H * D]`` is ``parted`` ``[B, S, H, D]`` merged, by known shapes."""
    if packed_.shape is None or parted.shape is None or len(packed_.shape) != 3 or len(parted.shape) != 4:
        return False
    same = all(_same(packed_.shape[i], parted.shape[i]) for i in (0, 1))
    return same and packed_.shape[2] == count * size and parted.shape[2] == count and parted.shape[3] == size


def _same(a: Any, b: Any) -> bool:
    """Say whether two sizes are known to be equal."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.value is not None and a.value == b.value


def unpacked(b: Builder, x: ir.Value, call: Call) -> ir.Value:
    """Return ``[B, Sq, H * Dv]`` as ``[B, H, Sq, Dv]``."""
    h, _, _, dv = call.numbers
    parted = b.op("Reshape", x, b.ints(0, 0, h, dv), dtype=call.dtype)
    return b.op("Transpose", parted, perm=[0, 2, 1, 3], dtype=call.dtype)


def without_rows(b: Builder, call: Call, packed_: list[ir.Value]) -> tuple[list[ir.Value], ir.Value | None]:
    """Return q, k and v without the biases of their projections, and those as one row for the operator.

    Only where two or more of them have one: for a single one, two rows of zeros would be added for nothing.
    """
    parts = [_stored_row(x) for x in packed_]
    if sum(p is not None for p in parts) < 2:
        return packed_, None
    widths = (n * d for n, d in zip(heads_of(call), sizes_of(call), strict=True))
    rows = [b.const([0.0] * n, call.dtype) if p is None else p[1] for n, p in zip(widths, parts, strict=True)]
    bare = [x if p is None else p[0] for x, p in zip(packed_, parts, strict=True)]
    return bare, b.op("Concat", *rows, axis=0, dtype=call.dtype)


def _stored_row(x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return y and the stored row r if ``x`` is y + r, where y is of x's size."""
    node = x.producer()
    if node is None or node.domain != "" or node.op_type != "Add":
        return None
    one, other = node.inputs
    for y, row in ((one, other), (other, one)):
        if y is None or not is_stored(row) or row.shape is None or x.shape is None:
            continue
        product = y.producer()
        multiplies = product is not None and product.domain == "" and product.op_type == "MatMul"
        if multiplies and len(row.shape) == 1 and row.shape[0] == x.shape[-1] and row.dtype == x.dtype:
            return y, row
    return None


def is_stored(x: ir.Value | None) -> TypeGuard[ir.Value]:
    """Say whether a value is stored in the file, or a part or another layout of one that is.

    The runtime folds such a value when it loads the file.
    """
    if x is None or x.const_value is not None:
        return x is not None
    node = x.producer()
    laid_out = node is not None and node.domain == "" and node.op_type in ("Slice", "Transpose", "Identity")
    return laid_out and node is not None and all(i is None or is_stored(i) for i in node.inputs)


def projections(packed_: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]] | None:
    """Return x and three stored matrices if q, k and v, each ``[B, S, H * D]``, are x times one of them."""
    products = [_product(x) for x in packed_]
    sources = {id(p[0]) for p in products if p is not None}
    if None in products or len(sources) != 1:
        return None
    found = [p for p in products if p is not None]
    return found[0][0], [weights for _, weights in found]


def _product(x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return y and the stored matrix w if ``x`` is y w."""
    node = x.producer()
    if node is None or node.domain != "" or node.op_type != "MatMul":
        return None
    y, w = node.inputs
    if y is None or not is_stored(w) or w.shape is None or w.dtype != x.dtype:
        return None
    return (y, w) if len(w.shape) == 2 else None
