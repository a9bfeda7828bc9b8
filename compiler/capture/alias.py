"""Find which nodes of a graph may share memory, which are written, and where torch itself loses a write.

Groups come from what the fake values share and from what op schemas declare, and err towards sharing.

A few ops hand back their input, or a view of it, without saying so in their schema.  Functionalization before
dispatch takes their result for new memory, and a write to it is lost without an error (torch 2.13: dropout in
eval, einsum with one operand, meshgrid, broadcast_tensors).  ``hidden_writes`` finds such graphs before they
are functionalized.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

_DROPOUTS = frozenset(
    {
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
    }
)
_VIEWS = frozenset({"einsum", "meshgrid", "broadcast_tensors"})
_MAY_ALIAS = _DROPOUTS | _VIEWS | {"type_as", "lift_fresh"}
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i")
    and callable(getattr(operator, name))
    and name[1:]
    in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "pow",
        "mod",
        "and",
        "or",
        "xor",
        "matmul",
        "lshift",
        "rshift",
    )
) | {operator.setitem}


def hidden_writes(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes whose undeclared aliases are written: dropouts that do nothing, and others.

    The first can be replaced by their input, which is what they return; the second cannot be helped.
    """
    suspects = [n for n in graph.nodes if _hides(n)]
    if not suspects:
        return [], []
    written = last_writes(graph)
    caught = [n for n in suspects if n in written]
    return [n for n in caught if op_name(n) in _DROPOUTS], [n for n in caught if op_name(n) not in _DROPOUTS]


def bypass(nodes: list[fx.Node]) -> None:
    """Replace each of ``nodes``, dropouts that do nothing, by its input."""
    for node in nodes:
        source = node.args[0]
        assert isinstance(source, fx.Node), f"{node.name} has no input"
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _hides(node: fx.Node) -> bool:
    """Say whether ``node`` hands back its input or a view of it without declaring so."""
    name = op_name(node)
    if name in _DROPOUTS:
        given: dict[int, object] = dict(enumerate(node.args))
        p, train = given.get(1, node.kwargs.get("p")), given.get(2)
        off = False in (train, node.kwargs.get("training"), node.kwargs.get("train"))
        return bool(node.args and (off or p == 0))
    if name == "einsum":
        operands = node.args[1] if len(node.args) == 2 else node.args[1:]
        return isinstance(operands, fx.Node) or (isinstance(operands, (tuple, list)) and len(operands) == 1)
    return name in _VIEWS


def last_writes(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return, per node whose storage is ever written, the position of the last write to that storage."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last: dict[int, int] = {}
    group = _storage_groups(graph)
    for node in graph.nodes:
        for target in writes(node):
            last[group[target]] = order[node]
    return {n: last[group[n]] for n in graph.nodes if group[n] in last}


def name_settled_operands(graph: fx.Graph) -> bool:
    """Give what a fused call reads a node of its own where the tensor was written after it was made.

    A key that is put together by writes into an empty tensor (as DeepSeek-V3's is, part rotated and part not)
    has no node that holds its value from there on, so no link leads to it.  An ``alias`` after the last write
    is one; it costs nothing.  Return whether there is any such operand.
    """
    written, order = last_writes(graph), {n: i for i, n in enumerate(graph.nodes)}
    named = False
    for call in list(graph.nodes):
        if op_name(call) != "scaled_dot_product_attention":
            continue
        for x in call.all_input_nodes:
            if order[x] < written.get(x, -1) < order[call]:
                with graph.inserting_before(call):
                    settled = graph.call_function(torch.ops.aten.alias.default, (x,))
                settled.meta = {**call.meta, "val": x.meta["val"]}
                call.replace_input_with(x, settled)
                named = True
    return named


def writes(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that ``node`` writes to: all, for a higher-order call that writes anything."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        operands = [x for x in flat(node.args) if isinstance(x, fx.Node)]
        return [x for x in operands if x.op != "get_attr"] if any(map(_body_writes, operands)) else []
    if not isinstance(target, torch._ops.OpOverload):
        return _torch_level_writes(node)
    written = []
    for arg, value in _named_arguments(node, target):
        if arg.alias_info is not None and arg.alias_info.is_write:
            written += [x for x in flat(value) if isinstance(x, fx.Node)]
    return written


def _torch_level_writes(node: fx.Node) -> list[fx.Node]:
    """Return what a node of Dynamo's graph writes to, by the conventions of torch's names."""
    name = op_name(node)
    in_place = node.target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    in_place = (
        in_place
        or node.kwargs.get("inplace") is True
        or (
            node.op == "call_function"
            and "functional" in str(getattr(node.target, "__module__", ""))
            and len(node.args) > 1
            and node.args[-1] is True
        )
    )
    written = [node.args[0]] if in_place and node.args else []
    return [x for x in [*written, *flat(node.kwargs.get("out"))] if isinstance(x, fx.Node)]


def _body_writes(node: fx.Node) -> bool:
    """Say whether ``node`` reads a sub-graph that writes in place."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return False
    body = getattr(node.graph.owning_module, str(node.target), None)
    return isinstance(body, fx.GraphModule) and any(writes(n) for n in body.graph.nodes)


def _storage_groups(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number the nodes so that nodes which may share memory have one number."""
    parent: dict[object, object] = {}

    def find(x: object) -> object:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for node in graph.nodes:
        for other in _aliases(node):
            parent[find(node)] = find(other)
    numbers: dict[object, int] = {}
    return {n: numbers.setdefault(find(n), len(numbers)) for n in graph.nodes}


def _aliases(node: fx.Node) -> Iterator[object]:
    """Yield what ``node`` may share memory with: earlier nodes and storage keys."""
    for value in flat(node.meta.get("val", node.meta.get("example_value"))):
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield ("storage", _plain(value).untyped_storage()._cdata)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        for arg, value in _named_arguments(node, target):
            if arg.alias_info is not None or op_name(node) in _MAY_ALIAS:
                yield from (x for x in flat(value) if isinstance(x, fx.Node))
    elif (
        target is operator.getitem
        or isinstance(target, torch._ops.HigherOrderOperator)
        or _hides(node)
        or op_name(node) in ("_add_batch_dim", "_remove_batch_dim")
    ):
        yield from (x for x in flat(node.args) if isinstance(x, fx.Node))


def _plain(value: torch.Tensor) -> torch.Tensor:
    """Return the tensor inside what vmap left in a graph; a batched tensor has no storage of its own."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def _named_arguments(node: fx.Node, target: torch._ops.OpOverload) -> Iterator[tuple[torch.Argument, object]]:
    """Yield the schema's argument and the value, for each argument that ``node`` passes."""
    for i, arg in enumerate(target._schema.arguments):
        if i < len(node.args):
            yield arg, node.args[i]
        elif arg.name in node.kwargs:
            yield arg, node.kwargs[arg.name]


def flat(args: object) -> Iterator[object]:
    """Yield the leaves of nested args, in order, and a mark with its length for each container."""
    if isinstance(args, (tuple, list)):
        yield ("len", len(args))
        for a in args:
            yield from flat(a)
    else:
        yield args


def op_name(node: fx.Node) -> str:
    """Return the bare name of an op, function or method: ``mul_`` for ``aten.mul_.Tensor``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "__name__", target))
