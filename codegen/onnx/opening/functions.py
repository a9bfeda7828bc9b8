"""Check the functions of an ONNX model: none calls itself, grows without bounds, or hides an operator.

Source: ONNX, Intermediate Representation: Functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attnc.codegen.onnx.opening.graphs import STEPS, check_attribute, check_nodes, check_type, subgraphs
from attnc.codegen.onnx.opening.wire import quoted
from attnc.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

STANDARD = ("", "ai.onnx")
RESERVED = (*STANDARD, "com.microsoft")
"""Domains whose operators have a meaning of their own; a function there would be taken for one."""
INLINED = 1_000_000
"""Nodes that a model may have once its functions are written out."""
CALLS = 100
"""Functions that call functions, at most so deep."""

_Key = tuple[str, str, str]
_Body = dict[_Key, int]


def check_functions(model: onnx.ModelProto) -> None:
    """Check all functions of a model, and what they become where they are called.

    Raises:
        CheckpointError: one name twice, a reserved name, a bad body, a function that calls itself, or more
            nodes than ``INLINED`` once all are written out.
    """
    functions: dict[_Key, onnx.FunctionProto] = {}
    for f in model.functions:
        where = f"function {title(f)}: "
        if not f.name:
            raise CheckpointError(f"{where}expected a name, found none")
        if f.domain in RESERVED:
            raise CheckpointError(
                f"{where}expected a domain of its own, found {f.domain or 'ai.onnx'}, whose operators it "
                "would hide"
            )
        if _key(f) in functions:
            raise CheckpointError(f"{where}expected one function of that name, found two")
        functions[_key(f)] = f
        _check_function(f, where)
        _check_versions(f, model, where)
    calls = {key: _calls(f.node, functions) for key, f in functions.items()}
    sizes: dict[_Key, int] = {}
    for key in functions:
        _grow(key, calls, sizes)
    own, inside = _calls(model.graph.node, functions)
    total = own + sum(n * sizes[k] for k, n in inside.items())
    if total > INLINED:
        raise CheckpointError(
            f"expected at most {INLINED:,} nodes once functions are written out, found {_round(total)}"
        )


def _check_function(f: onnx.FunctionProto, where: str) -> None:
    for names, what in ((f.input, "inputs"), (f.output, "outputs")):
        if len(set(names)) != len(names) or "" in names:
            raise CheckpointError(
                f"{where}expected each of its {what} once, found {quoted(list(names)[:STEPS])}"
            )
    declared = [*f.attribute, *(a.name for a in f.attribute_proto)]
    if len(set(declared)) != len(declared):
        raise CheckpointError(
            f"{where}expected each of its attributes once, found {quoted(declared[:STEPS])}"
        )
    for a in f.attribute_proto:
        check_attribute(a, f"{where}attribute {quoted(a.name)}: ")
        if a.ref_attr_name or any(True for _ in subgraphs((a,))):
            raise CheckpointError(f"{where}attribute {quoted(a.name)}: expected a plain value by default")
    for info in f.value_info:
        check_type(info.type, f"{where}value {quoted(info.name)}")
    check_nodes(f.node, set(f.input), f.output, where, declared=frozenset(declared))


def _check_versions(f: onnx.FunctionProto, model: onnx.ModelProto, where: str) -> None:
    """Check that each operator means in the function what it means in the model's own version."""
    outside = {i.version for i in model.opset_import if i.domain in STANDARD}
    inside = {i.version for i in f.opset_import if i.domain in STANDARD}
    if not inside or inside == outside:
        return
    for name in sorted({n.op_type for n in walk(f.node) if n.domain in STANDARD}):
        found = {since(name, v) for v in (*outside, *inside)}
        if len(found) > 1:
            raise CheckpointError(
                f"{where}expected the operators of ai.onnx {max(outside, default=0)}, found {name} of "
                f"{max(inside)}, which is another"
            )


def since(operator: str, version: int) -> int | None:
    """Return the version that defined what an operator of ai.onnx means at ``version``, None if none did."""
    import onnx.defs

    try:
        return int(onnx.defs.get_schema(operator, max_inclusive_version=version, domain="").since_version)
    except onnx.defs.SchemaError:
        return None


def walk(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Give the nodes and those in graphs inside them."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        for graph in subgraphs(node.attribute):
            pending.extend(graph.node)


def _calls(nodes: list[onnx.NodeProto], functions: Mapping[_Key, object]) -> tuple[int, _Body]:
    """Return how many plain nodes there are, and how often each function is called."""
    plain, called = 0, _Body()
    for node in walk(nodes):
        key = (node.domain, node.op_type, node.overload)
        if key in functions:
            called[key] = called.get(key, 0) + 1
        else:
            plain += 1
    return plain, called


def _grow(start: _Key, calls: Mapping[_Key, tuple[int, _Body]], sizes: dict[_Key, int]) -> None:
    """Fill in the nodes of ``start`` once all that it calls is written out, innermost first."""
    way: list[_Key] = [start]
    while way:
        key = way[-1]
        waiting = next((k for k in calls[key][1] if k not in sizes), None)
        if waiting is None:
            sizes[key] = calls[key][0] + sum(n * sizes[k] for k, n in calls[key][1].items())
            way.pop()
        elif waiting in way or len(way) >= CALLS:
            names = [f"{domain}.{name}" for domain, name, _ in (*way, waiting)][-STEPS:]
            what = "no function that calls itself" if waiting in way else f"calls at most {CALLS} deep"
            raise CheckpointError(f"expected {what}, found {' -> '.join(map(quoted, names))}")
        else:
            way.append(waiting)


def _key(f: onnx.FunctionProto) -> _Key:
    return f.domain, f.name, f.overload


def _round(n: int) -> str:
    return f"{n:,}" if n < 10**15 else f"about 10 to the power of {len(str(n)) - 1}"


def title(f: onnx.FunctionProto) -> str:
    """Name a function for a reader."""
    return quoted(".".join(filter(None, (f.domain, f.name, f.overload))))
