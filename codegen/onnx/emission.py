"""Write the few ATen calls that a rewrite puts around a site as ONNX nodes: views, sizes, and conditions.

One small function per call, by target in ``TENSORS``; sizes are int64 vectors of one element.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc.codegen.onnx.builder import Builder, torch_dtype
from attnc.codegen.onnx.reading.reader import size_in_file
from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten
_FAR = 2**62


@dataclass
class Emission:
    """Write nodes of an fx graph with ``b``, which a caller sets to where they belong.

    ``values`` holds what is written or was in the file, by the name of the fx node; ``in_file`` says of a
    size which element of which value it is; ``names`` are the file's names for symbols.
    """

    b: Builder
    values: dict[str, ir.Value]
    in_file: Mapping[str, tuple[ir.Value, int]]
    names: Mapping[str, str]
    sizes: dict[str, ir.Value] = field(default_factory=dict)

    def value(self, node: fx.Node) -> ir.Value:
        """Return the value of a tensor node.

        Raises:
            CodegenError: it is neither in the file nor written yet.
        """
        found = self.values.get(node.name)
        if found is None:
            raise CodegenError(f"ONNX: {node.name} ({node.target}) is no value of the file")
        return found

    def write(self, node: fx.Node) -> None:
        """Write one tensor node.

        Raises:
            CodegenError: no rewrite makes such a call.
        """
        rule = TENSORS.get(node.target)
        if rule is None:
            raise CodegenError(f"ONNX: expected a call that a rewrite makes, found {node.target}")
        out = rule(self, node)
        val = node.meta["val"]
        if out is not self.values.get(_source(node)):
            out.shape = self.shape(val)
        self.values[node.name] = out

    def shape(self, val: torch.Tensor) -> ir.Shape:
        """Return a shape in the file's names."""
        import onnx_ir as ir

        return ir.Shape([n if isinstance(n, int) else self._named(n) for n in val.shape])

    def _named(self, size: torch.SymInt) -> str:
        expr = size.node.expr
        own = {s: self.names.get(str(s), str(s)) for s in expr.free_symbols}
        if expr in own:
            return own[expr]
        text = str(expr)
        for symbol, name in own.items():
            text = text.replace(str(symbol), name)
        return text

    # ------------------------------------------------------------ sizes

    def size(self, x: Any) -> ir.Value:
        """Return a number or a size as an int64 vector of one element."""
        if isinstance(x, int):
            return self.b.ints(x)
        assert isinstance(x, fx.Node), f"{x} is no size"
        if x.name not in self.sizes:
            self.sizes[x.name] = self._size(x)
        return self.sizes[x.name]

    def _size(self, x: fx.Node) -> ir.Value:
        if x.target is aten.sym_size.int:
            source, axis = x.args
            assert isinstance(source, fx.Node), "a size is that of a tensor"
            assert isinstance(axis, int), "an axis is a number"
            return self.b.size(self.value(source), axis % source.meta["val"].dim())
        if x.target in (operator.mul, operator.add):
            a, b = (self.size(y) for y in x.args)
            return self.b.op("Mul" if x.target is operator.mul else "Add", a, b, dtype=torch.int64, shape=[1])
        if x.target is size_in_file and x.name in self.in_file:
            whole, place = self.in_file[x.name]
            flat = self.b.op("Reshape", whole, self.b.ints(-1))
            one = self.b.op("Gather", flat, self.b.ints(place), axis=0, dtype=torch_dtype(whole), shape=[1])
            return self.b.cast(one, torch.int64)
        raise CodegenError(f"ONNX: expected a size that the file computes, found {x.target}")

    def vector(self, sizes: Sequence[Any]) -> ir.Value:
        """Return sizes as one int64 vector."""
        if all(isinstance(n, int) for n in sizes):
            return self.b.ints(*sizes)
        parts = [self.size(n) for n in sizes]
        if len(parts) == 1:
            return parts[0]
        return self.b.op("Concat", *parts, axis=0, dtype=torch.int64, shape=[len(parts)])

    def number(self, x: Any, dtype: torch.dtype) -> ir.Value:
        """Return an operand of an elementwise call: a tensor's value, or a scalar of type ``dtype``."""
        if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor):
            return self.value(x)
        if isinstance(x, fx.Node):
            return self.b.cast(self.b.scalar(self.size(x)), dtype)
        return self.b.const(x, dtype)


def _source(node: fx.Node) -> str:
    first = node.args[0] if node.args else None
    return first.name if isinstance(first, fx.Node) else ""


_Rule = Callable[[Emission, fx.Node], "ir.Value"]


def _type(node: fx.Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


def _first(e: Emission, node: fx.Node) -> ir.Value:
    source = node.args[0]
    assert isinstance(source, fx.Node), f"{node} reads no tensor"
    return e.value(source)


def _same(e: Emission, node: fx.Node) -> ir.Value:
    return _first(e, node)


def _reshape(e: Emission, node: fx.Node) -> ir.Value:
    """Write a reshape; a size that stays on its axis is copied (0), one other free one worked out (-1)."""
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    source = node.args[0]
    assert isinstance(source, fx.Node), f"{node} reads no tensor"
    before = [str(n) for n in source.meta["val"].shape]
    after = [str(n) for n in node.meta["val"].shape]
    for i, n in enumerate(sizes):
        if isinstance(n, fx.Node) and i < len(before) and before[i] == after[i]:
            sizes[i] = 0
    free = [i for i, n in enumerate(sizes) if isinstance(n, fx.Node)]
    if len(free) == 1:
        sizes[free[0]] = -1
    return e.b.op("Reshape", _first(e, node), e.vector(sizes), dtype=_type(node))


def _permute(e: Emission, node: fx.Node) -> ir.Value:
    return e.b.op("Transpose", _first(e, node), perm=list(node.args[1]), dtype=_type(node))  # type: ignore[arg-type]


def _expand(e: Emission, node: fx.Node) -> ir.Value:
    return e.b.op("Expand", _first(e, node), e.vector(list(node.args[1])), dtype=_type(node))  # type: ignore[arg-type]


def _select(e: Emission, node: fx.Node) -> ir.Value:
    _, axis, at = node.args
    return e.b.op("Gather", _first(e, node), e.b.scalar(e.size(at)), axis=axis, dtype=_type(node))


def _slice(e: Emission, node: fx.Node) -> ir.Value:
    _, axis, start, end = node.args[:4]
    assert isinstance(axis, int), "an axis is a number"
    ends = e.b.ints(_FAR) if end is None else e.size(end)
    return e.b.op("Slice", _first(e, node), e.size(start or 0), ends, e.b.ints(axis), dtype=_type(node))


def _cat(e: Emission, node: fx.Node) -> ir.Value:
    parts, axis = node.args
    assert isinstance(parts, Sequence), "a concatenation has parts"
    xs = [e.value(p) for p in parts if isinstance(p, fx.Node)]
    return e.b.op("Concat", *xs, axis=axis, dtype=_type(node))


def _arange(e: Emission, node: fx.Node) -> ir.Value:
    end = e.b.scalar(e.size(node.args[0]))
    return e.b.op("Range", e.b.const(0, torch.int64), end, e.b.const(1, torch.int64), dtype=torch.int64)


def _full(e: Emission, node: fx.Node) -> ir.Value:
    sizes, fill = node.args
    assert isinstance(sizes, Sequence), "a shape is a list"
    dtype = _type(node)
    one = e.b.cast(e.size(fill), dtype) if isinstance(fill, fx.Node) else e.b.const([fill], dtype)  # type: ignore[list-item]
    return e.b.op("Expand", one, e.vector(list(sizes)), dtype=dtype)


def _zeros(e: Emission, node: fx.Node) -> ir.Value:
    sizes = node.args[0]
    assert isinstance(sizes, Sequence), "a shape is a list"
    return e.b.op("Expand", e.b.const([0], _type(node)), e.vector(list(sizes)), dtype=_type(node))


def _cast(e: Emission, node: fx.Node) -> ir.Value:
    return e.b.cast(_first(e, node), _type(node))


def _binary(name: str) -> _Rule:
    def rule(e: Emission, node: fx.Node) -> ir.Value:
        x = node.args[0]
        assert isinstance(x, fx.Node), f"{node} reads no tensor"
        return e.b.op(name, e.value(x), e.number(node.args[1], _type(x)), dtype=_type(node))

    return rule


def _not_equal(e: Emission, node: fx.Node) -> ir.Value:
    return e.b.op("Not", _binary("Equal")(e, node), dtype=torch.bool)


def _not(e: Emission, node: fx.Node) -> ir.Value:
    return e.b.op("Not", _first(e, node), dtype=torch.bool)


def _where(e: Emission, node: fx.Node) -> ir.Value:
    _, a, b = node.args
    dtype = _type(node)
    return e.b.op("Where", _first(e, node), e.number(a, dtype), e.number(b, dtype), dtype=dtype)


def _floor_division(e: Emission, node: fx.Node) -> ir.Value:
    """Write ``floor(x / n)`` of whole numbers as ``(x - x mod n) / n``: Div cuts towards zero."""
    x, n = _first(e, node), e.number(node.args[1], _type(node))
    rest = e.b.op("Mod", x, n, dtype=_type(node))
    return e.b.op("Div", e.b.op("Sub", x, rest, dtype=_type(node)), n, dtype=_type(node))


TENSORS: Mapping[Any, _Rule] = {
    aten.clone.default: _same,
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.arange.default: _arange,
    aten.full.default: _full,
    aten.zeros.default: _zeros,
    aten.to.dtype: _cast,
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.add.Tensor: _binary("Add"),
    aten.add.Scalar: _binary("Add"),
    aten.le.Scalar: _binary("LessOrEqual"),
    aten.eq.Scalar: _binary("Equal"),
    aten.ne.Scalar: _not_equal,
    aten.bitwise_and.Tensor: _binary("And"),
    aten.bitwise_or.Tensor: _binary("Or"),
    aten.bitwise_not.default: _not,
    aten.where.self: _where,
    aten.remainder.Scalar: _binary("Mod"),
    aten.div.Scalar_mode: _floor_division,
}
