"""Attributes of a node in plain Python, with their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from attnc.codegen.onnx.reading.reader import Reader


def number(n: ir.Node, name: str, default: Any) -> Any:
    """Return an int, float or string attribute."""
    found = n.attributes.get(name)
    return default if found is None else found.value


def ints(n: ir.Node, name: str) -> list[int] | None:
    """Return a list of ints, None if it is not given."""
    found = n.attributes.get(name)
    return None if found is None else list(found.as_ints())


def axes_of(r: Reader, n: ir.Node, since: int) -> list[int] | None:
    """Return the axes of a node: its second input from opset ``since`` on, an attribute before."""
    return r.numbers(n, 1) if r.opset >= since else ints(n, "axes")
