"""Work out small integer tensors element by element: numbers stay numbers, sizes stay symbolic.

Exported graphs are full of such arithmetic (Shape, Gather, Concat, Reshape), which says in many nodes what a
shape is.  A rule gets the node and the elements of its inputs and returns the elements of its output, or None
where they cannot be told; it must be exact.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnc.codegen.onnx.reading.attributes import axes_of, ints, number
from attnc.codegen.onnx.reading.reader import KNOWN, Items, Reader, as_items
from attnc.codegen.onnx.reading.tensors import torch_type

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = 2**63
"""Numbers beyond are no 64-bit integers; they would wrap in a runtime, and grow without bounds here."""

Rule = Callable[["Reader", "ir.Node", "Sequence[Items | None]"], "Items | list[Items] | None"]


def _each(f: Callable[..., Any], *arrays: Items) -> Items | None:
    """Apply ``f`` to elements that are broadcast; None if it cannot tell one of them, or if they are many."""
    if math.prod(np.broadcast_shapes(*(a.shape for a in arrays))) > KNOWN:
        return None
    spread = np.broadcast_arrays(*arrays)
    out = [f(*xs) for xs in zip(*(a.flat for a in spread), strict=True)]
    return as_items(out, spread[0].shape) if all(map(_is_told, out)) else None


def _is_told(x: Any) -> bool:
    """Say whether an element is known: a number of 64 bits, or a size whose hint is one."""
    if isinstance(x, torch.SymInt):
        hint = x.node.hint
        return hint is None or abs(int(hint)) < LARGEST
    return x is not None and -LARGEST <= x < LARGEST


def _elementwise(f: Callable[..., Any]) -> Rule:
    def rule(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
        given = [x for x in xs if x is not None]
        out = _each(f, *given[:2])
        for x in given[2:]:
            out = None if out is None else _each(f, out, x)
        return out

    return rule


def _unary(f: Callable[[Any], Any]) -> Rule:
    def rule(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
        return None if xs[0] is None else _each(f, xs[0])

    return rule


def _divided(a: Any, b: Any) -> Any:
    """Divide as ONNX does, towards zero; of symbolic sizes only positive ones are known to agree."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else math.trunc(a / b) if abs(a) < 2**52 else None
    return a // b if is_positive(a) and is_positive(b) else None


def _remainder(a: Any, b: Any) -> Any:
    if isinstance(b, int) and b == 0:
        return None
    return a % b if is_positive(b) and (isinstance(a, int) or is_positive(a)) else None


def is_positive(x: Any) -> bool:
    """Say whether a number or a size is 1 or more, whatever the sizes are."""
    return bool(x >= 1) if isinstance(x, int) else statically_known_true(x >= 1)


def decided(condition: Any) -> bool | None:
    """Return what a condition on sizes is for all sizes, None if it depends on them."""
    if isinstance(condition, bool):
        return condition
    if statically_known_true(condition):
        return True
    denied = torch.sym_not(condition)  # type: ignore[no-untyped-call]
    return False if statically_known_true(denied) else None


def _compared(f: Callable[[Any, Any], Any]) -> Rule:
    return _elementwise(lambda a, b: decided(f(a, b)))


def _extreme(greatest: bool) -> Rule:
    def choose(a: Any, b: Any) -> Any:
        above = decided(a >= b)
        return None if above is None else a if above == greatest else b

    return _elementwise(choose)


def _where(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    c, a, b = xs
    return None if c is None or a is None or b is None else _each(lambda c, a, b: a if c else b, c, a, b)


def _cast(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    to, x = number(n, "to", 0), xs[0]
    if x is None or to not in (6, 7, 9):
        return None
    if to == 9:
        return _each(lambda e: decided(e != 0), x)
    return _each(lambda e: int(e) if isinstance(e, bool) else e, x)


def _shape(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    sizes = list(r.x(n, 0).meta["val"].shape)
    start, end = number(n, "start", 0), number(n, "end", None)
    return as_items(sizes[start:end], [len(sizes[start:end])])


def _size(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    found = math.prod(r.x(n, 0).meta["val"].shape)
    return as_items([found], []) if _is_told(found) else None


def _transpose(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    return None if xs[0] is None else xs[0].transpose(ints(n, "perm"))


def _concat(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    given = [x for x in xs if x is not None]
    return np.concatenate(given, axis=number(n, "axis", 0)) if sum(x.size for x in given) <= KNOWN else None


def _gather(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    data, places = xs
    if data is None or places is None or any(isinstance(p, torch.SymInt) for p in places.flat):
        return None
    found = np.take(data, places.astype(np.int64), axis=number(n, "axis", 0))
    return found if isinstance(found, np.ndarray) else as_items([found], [])


def _slice(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    x = xs[0]
    starts, ends = r.numbers(n, 1), r.numbers(n, 2)
    if x is None or starts is None or ends is None:
        return None
    axes, steps = r.numbers(n, 3) or list(range(len(starts))), r.numbers(n, 4) or [1] * len(starts)
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        far = end < -(2**31) + 2 or (step < 0 and end < -x.shape[axis])
        cut[axis] = slice(start, None if far else end, step)
    return x[tuple(cut)]


def _unsqueeze(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    axes = axes_of(r, n, 13)
    return None if xs[0] is None or axes is None else np.expand_dims(xs[0], tuple(axes))


def _squeeze(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    axes, x = axes_of(r, n, 13), xs[0]
    return None if x is None else x.squeeze(None if axes is None else tuple(axes))


def _reshape(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    to = r.numbers(n, 1)
    if xs[0] is None or to is None:
        return None
    keep = not number(n, "allowzero", 0)
    return xs[0].reshape([xs[0].shape[i] if m == 0 and keep else m for i, m in enumerate(to)])


def _expand(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    to = r.numbers(n, 1)
    if xs[0] is None or to is None or math.prod(to) > KNOWN:
        return None
    return np.broadcast_to(xs[0], np.broadcast_shapes(xs[0].shape, tuple(to))).copy()


def _split(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> list[Items] | None:
    x, axis = xs[0], number(n, "axis", 0)
    if x is None:
        return None
    parts = r.numbers(n, 1) or ints(n, "split")
    if not parts:
        each = -(-x.shape[axis] // len(n.outputs))
        parts = [each] * len(n.outputs)
    return np.split(x, np.cumsum(parts)[:-1], axis=axis)[: len(n.outputs)]


def _constant_of_shape(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    sizes = r.numbers(n, 0)
    given = n.attributes.get("value")
    tensor = None if given is None else given.as_tensor()
    dtype = None if tensor is None else torch_type(tensor.dtype)
    if sizes is None or tensor is None or math.prod(sizes) > KNOWN:
        return None
    if dtype not in (torch.int64, torch.int32, torch.bool):
        return None
    return as_items([tensor.numpy().flat[0].item()] * math.prod(sizes), sizes)


def _reduced(f: Callable[[Any, Any], Any]) -> Rule:
    """Reduce all elements of a vector."""

    def rule(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
        x = xs[0]
        if x is None or x.ndim != 1 or not x.size:
            return None
        out = x.flat[0]
        for e in x.flat[1:]:
            out = f(out, e)
            if not _is_told(out):
                return None
        return as_items([out], [1] if number(n, "keepdims", 1) else [])

    return rule


def _range(r: Reader, n: ir.Node, xs: Sequence[Items | None]) -> Items | None:
    """Write out a short range of numbers; a longer one is better known by its rule."""
    if any(x is None or isinstance(x.flat[0], torch.SymInt) for x in xs):
        return None
    start, end, step = (int(x.flat[0]) for x in xs if x is not None)
    values = range(start, end, step) if step else range(0)
    return as_items(list(values), [len(values)]) if len(values[:9]) <= 8 else None


KNOWN_RULES: dict[str, Rule] = {
    "Identity": _unary(lambda x: x),
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _elementwise(_divided),
    "Mod": _elementwise(_remainder),
    "Neg": _unary(operator.neg),
    "Abs": _unary(lambda x: x if is_positive(x) else abs(x) if isinstance(x, int) else None),
    "Max": _extreme(True),
    "Min": _extreme(False),
    "Equal": _compared(operator.eq),
    "Less": _compared(operator.lt),
    "LessOrEqual": _compared(operator.le),
    "Greater": _compared(operator.gt),
    "GreaterOrEqual": _compared(operator.ge),
    "And": _elementwise(lambda a, b: bool(a and b)),
    "Or": _elementwise(lambda a, b: bool(a or b)),
    "Not": _unary(lambda a: not a),
    "Where": _where,
    "Cast": _cast,
    "Shape": _shape,
    "Size": _size,
    "Transpose": _transpose,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "Split": _split,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _reduced(operator.mul),
    "ReduceSum": _reduced(operator.add),
    "Range": _range,
}

FROM_SHAPE = frozenset({"Shape", "Size"})
"""Operators that read the shape of their input, and no element."""
