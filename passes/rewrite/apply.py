"""Put a found site into the graph as one ``attnc::attend`` node, and erase what computed it before."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attnc import expr as E
from attnc.editing import Builder, SharedMemory, erase
from attnc.errors import RewriteError
from attnc.expr import Expr
from attnc.ir import AttentionSpec, Miss
from attnc.passes.detect.found import Computed, Flat, Found, Joined, Making, Term
from attnc.passes.detect.graph import reads_size_only, strides
from attnc.passes.detect.layout import Recipe
from attnc.passes.rewrite.predicates import emit
from attnc.printer import parse
from attnc.sizes import dim

aten = torch.ops.aten
_SWITCHES = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


class NoLinkError(Exception):
    """A node of the working graph has no counterpart that holds its value in the user's graph."""


class Rewriter:
    """Apply sites to one captured graph.

    ``graph`` is edited, ``work`` was detected on, ``links`` map names of the latter to the former.
    ``moments`` does so for nodes that may be replaced, though not read later on; None: the same as ``links``.
    """

    def __init__(
        self,
        graph: fx.Graph,
        work: fx.Graph,
        links: Mapping[str, str],
        moments: Mapping[str, str] | None = None,
    ) -> None:
        self.graph, self.links = graph, links
        self.moments = links if moments is None else moments
        self.nodes: dict[str, fx.Node] = {n.name: n for n in graph.nodes}
        self.work = {n.name: n for n in work.nodes}
        self.build = Builder(graph)
        self.shared = SharedMemory(graph)
        self.order = {n.name: i for i, n in enumerate(graph.nodes)}
        self.switches = [i for i, n in enumerate(graph.nodes) if any(s in str(n.target) for s in _SWITCHES)]

    def resolve(self, name: str) -> fx.Node:
        """Return the node of the edited graph for a node of the working graph.

        Raises:
            NoLinkError: there is none, or it was erased.
        """
        return self._linked(name, self.links)

    def replaceable(self, name: str) -> fx.Node:
        """Return the node of the edited graph that can be replaced where the working graph has ``name``.

        Raises:
            NoLinkError: there is none, or it was erased.
        """
        return self._linked(name, self.moments)

    def _linked(self, name: str, links: Mapping[str, str]) -> fx.Node:
        node = self.nodes.get(links.get(name, ""))
        if node is None or node._erased:
            raise NoLinkError(name)
        return node

    def blocked(self, found: Found) -> Miss | None:
        """Say why the site cannot be edited in the user's graph, None if it can."""
        site, anchor = found.match, found.anchor
        recipes = found.makings
        try:
            out = self.replaceable(site.output)
            sources = [self.resolve(n) for r in recipes for n in r.reads]
        except NoLinkError as e:
            why = (
                "it has no counterpart in the captured graph: it is written in place, or lives in a sub-graph"
            )
            return Miss("no-link", str(e), why)
        self.build.before(out)
        unknown = self._unknown_sizes(recipes, found.result, sources)
        vals = [u.meta["val"] for u in self._size_readers(found)]
        read = [dim(n) for v in vals for n in (v.shape if isinstance(v, torch.Tensor) else (v,))]
        unknown += [size for size in read if not self.build.knows(size)]
        if unknown:
            return Miss(
                "size-not-known", anchor, f"size {unknown[0]} is no polynomial of sizes of the inputs"
            )
        if any(s.name in self.order and self.order[s.name] >= self.order[out.name] for s in sources):
            return Miss("operand-after-output", anchor, "an operand is made after the site's output")
        first = min(
            (self.order[n] for w in site.region if (n := self.moments.get(w)) in self.order),
            default=self.order[out.name],
        )
        if any(first < i < self.order[out.name] for i in self.switches):
            return Miss("crosses-switch", anchor, "the site spans a change of grad mode or autocast")
        return None

    def _unknown_sizes(
        self, recipes: Sequence[Making], result: Recipe, sources: Sequence[fx.Node]
    ) -> list[Expr]:
        """Return the sizes that the site needs and that nothing in the graph computes.

        The result has the axes of its operands, the ``sources``.
        """
        unknown = [n for n in sizes_of(result) if not any(self.build.knows(n, s) for s in sources)]
        for r in recipes:
            at = self.resolve(r.reads[0]) if r.reads else sources[0]
            unknown += [n for n in sizes_of(r) if not self.build.knows(n, at)]
        return unknown

    def apply(
        self, found: Found, spec: AttentionSpec | None = None, stamp: Mapping[str, Any] | None = None
    ) -> str:
        """Replace the site's output by an ``attend`` node.

        ``spec``, if given, takes the place of the found one.

        Returns the name of the node that now holds the output's value.

        Raises:
            RewriteError: the old anchor is still alive afterwards.
        """
        spec = spec or found.match.spec
        out = self.replaceable(found.match.output)
        like = self.nodes.get(self.moments.get(found.anchor, ""), out)
        b = self.build.before(out, stamp, like)
        value = self._sum(found.terms or (Term(spec, found.operands, found.captured),), found.flats)
        value = b.apply(value, found.result.steps)
        was = out.meta["val"]
        if value.meta["val"].dtype != was.dtype:
            value = b.call(aten.to.dtype, value, was.dtype)
        if _is_row_major(was) and not _is_row_major(value.meta["val"]):
            value = b.call(
                aten.clone.default, value, memory_format=torch.contiguous_format
            )  # for later views
        elif (order := _order_in_memory(was)) is not None and _views_follow(out):
            back = [order.index(d) for d in range(len(order))]
            value = b.call(aten.permute.default, value, order)
            value = b.call(aten.clone.default, value, memory_format=torch.contiguous_format)
            value = b.call(aten.permute.default, value, back)
        out.replace_all_uses_with(value, propagate_meta=False)
        self.nodes[out.name] = value  # the operand of another site, perhaps
        for user in self._size_readers(found):
            self._read_size_elsewhere(user)
        erase(self.graph, [out], shared=self.shared)
        self._assert_gone(found, out)
        return value.name

    def _sum(self, terms: Sequence[Term], flats: Sequence[Flat]) -> fx.Node:
        """Return the sum of attentions and flat terms ``[B, H, Sq, Dv]``, each times its number and gates."""
        values = [self._gated(self._attend(t), t) for t in terms]
        for f in flats:
            total = self.build.call(aten.sum.dim_IntList, self._made(f.values, None), [2], True)
            if terms[0].spec.group_size > 1:
                total = self.build.call(aten.repeat_interleave.self_int, total, terms[0].spec.group_size, 1)
            values.append(self._gated(total, f))
        out = values[0]
        for value in values[1:]:
            out = self.build.call(aten.add.Tensor, out, value)
        return out

    def _gated(self, value: fx.Node, t: Term | Flat) -> fx.Node:
        """Return a term times its gates and its number, in the term's dtype."""
        dtype = value.meta["val"].dtype
        for g in t.gates:
            gate = self._made(g, None)
            gate = gate if gate.meta["val"].dtype == dtype else self.build.call(aten.to.dtype, gate, dtype)
            value = self.build.call(aten.mul.Tensor, value, gate)
        return value if t.number == 1.0 else self.build.call(aten.mul.Tensor, value, t.number)

    def _attend(self, t: Term) -> fx.Node:
        """Return the output ``[B, H, Sq, Dv]`` of one ``attend`` node."""
        q, k, v = (self._made(t.operands[n], None) for n in "qkv")
        device = q.meta["val"].device
        captured = [self._made(t.captured[o.name], device) for o in t.spec.captured if o.name in t.captured]
        node = self.build.call(torch.ops.attnc.attend.default, q, k, v, captured, str(t.spec))
        return self.build.call(operator.getitem, node, 0)

    def _size_readers(self, found: Found) -> list[fx.Node]:
        """Return the nodes that read a size or the type of a node of the region, and none of its elements."""
        region = [self.nodes.get(self.moments.get(n, "")) for n in sorted(found.match.region)]
        alive = [n for n in region if n is not None and not n._erased]
        return list(dict.fromkeys(u for n in alive for u in n.users if reads_size_only(u, n)))

    def _read_size_elsewhere(self, reader: fx.Node) -> None:
        """Let a reader of a size, or of a type, of the region have it from elsewhere."""
        if reader.op == "call_function" and isinstance(reader.meta["val"], torch.Tensor):
            like = self._like(reader)
            reader.replace_all_uses_with(like, propagate_meta=False)
            self.nodes[reader.name] = like
        else:
            size = self.build.size(dim(reader.meta["val"]))
            if isinstance(size, fx.Node):
                reader.replace_all_uses_with(size, propagate_meta=False)
            else:
                for user in list(reader.users):
                    user.args = fx.node.map_arg(user.args, lambda n: size if n is reader else n)
                    user.kwargs = fx.node.map_arg(user.kwargs, lambda n: size if n is reader else n)
        self.graph.erase_node(reader)

    def _like(self, reader: fx.Node) -> fx.Node:
        """Return what ``x.reshape_as(region)`` and its kin give, made without the region."""
        x, val = reader.args[0], reader.meta["val"]
        b = self.build.before(reader, reader.meta.get("attnc"), reader)
        assert isinstance(x, fx.Node), f"{reader.name} reads no tensor"
        if x.meta["val"].dtype != val.dtype:
            return b.call(aten.to.dtype, x, val.dtype)
        sizes = [dim(n) for n in val.shape]
        return b.expand(x, sizes) if "expand" in str(reader.target) else b.reshape(x, sizes)

    def _made(self, r: Making, device: torch.device | None) -> fx.Node:
        """Return the node of an operand; ``device`` is where conditions are computed."""
        if isinstance(r, Computed):
            assert device is not None, "q, k and v are no conditions"
            return emit(r, self.build, self.resolve, self.work, device)
        if isinstance(r, Joined):
            return self._joined(r, device)
        return self.build.apply(self.resolve(r.source), r.steps)

    def _joined(self, r: Joined, device: torch.device | None) -> fx.Node:
        parts = [None if p is None else self._made(p, device) for p in r.parts]
        lengths = [self._length(p, r, i, device) for i, p in enumerate(parts)]
        known = [[dim(n) for n in p.meta["val"].shape] for p in parts if p is not None]
        wide = [next((n for n in axis if n != E.ONE), E.ONE) for axis in zip(*known, strict=True)]
        like = next(p for p in parts if p is not None)
        out = []
        for part, length in zip(parts, lengths, strict=True):
            sizes = [length if d == r.axis else n for d, n in enumerate(wide)]
            if part is None:
                val, numbers = like.meta["val"], [self.build.size(n, like) for n in sizes]
                part = self.build.call(aten.zeros.default, numbers, dtype=val.dtype, device=val.device)
            out.append(self.build.expand(part, sizes))
        return self.build.call(aten.cat.default, out, r.axis)

    def _length(self, part: fx.Node | None, r: Joined, i: int, device: torch.device | None) -> Expr:
        """Return how long part ``i`` is along the joined axis: as long as the part beside it."""
        if r.beside is None:
            assert part is not None, "a part is missing, and nothing says how long it is"
            return dim(part.meta["val"].shape[r.axis])
        beside = r.beside.parts[i]
        assert beside is not None, "the keys have all their parts"
        return dim(self._made(beside, device).meta["val"].shape[r.beside.axis])

    def _assert_gone(self, found: Found, out: fx.Node) -> None:
        """Raise if what the site replaces is still computed; weights that others read stay by design."""
        anchor = self.nodes.get(self.moments.get(found.anchor, ""))
        old = out if found.match.escapes or found.anchor == found.match.output else anchor
        if old is not None and not old._erased:
            users = [u.name for u in old.users]
            raise RewriteError(f"{found.match.site.id}: expected {old.name} to be gone, found users {users}")


def _is_row_major(t: torch.Tensor) -> bool:
    """Say whether a fake tensor is contiguous, by its strides as polynomials.

    Asking torch might add a guard.
    """
    sizes = tuple(map(dim, t.shape))
    wanted = zip(sizes, map(dim, t.stride()), strides(sizes), strict=True)
    return all(n == E.ONE or found == stride for n, found, stride in wanted)


def _order_in_memory(t: torch.Tensor) -> list[int] | None:
    """Return the axes of a fake tensor by falling stride, None if it is row-major or its strides have names.

    Axes of size 1 come where they stand.
    """
    steps = [n for n in t.stride() if isinstance(n, int)]
    if len(steps) < t.dim() or _is_row_major(t):
        return None
    order = sorted((d for d in range(t.dim()) if t.shape[d] != 1), key=lambda d: -steps[d])
    for d in range(t.dim()):
        if t.shape[d] == 1:
            order.insert(d, d)
    return order


def _views_follow(node: fx.Node) -> bool:
    """Say whether a view that depends on strides reads the node, or what keeps its strides."""
    seen, stack = {node}, [node]
    while stack:
        for u in stack.pop().users:
            target = u.target
            if u in seen or not isinstance(target, torch._ops.OpOverload):
                continue
            if target.overloadpacket in (aten.view, aten._unsafe_view):
                return True
            aliases = any(r.alias_info is not None for r in target._schema.returns)
            if aliases or torch.Tag.pointwise in target.tags:
                seen.add(u)
                stack.append(u)
    return False


def sizes_of(r: Making) -> list[Expr]:
    """Return the sizes and positions that building an operand takes."""
    if isinstance(r, Joined):
        return [n for p in r.parts if p is not None for n in sizes_of(p)]
    if isinstance(r, Recipe):
        return [n for name, arg in r.steps if name != "permute" for n in arg if isinstance(n, Expr)]
    sizes = [E.generator(g) for g in E.walk(r.value) if g.op in ("size", "opaque")]
    return sizes + [a.args[1] for axis in r.axes for a in axis]


def parsed(node: fx.Node) -> AttentionSpec:
    """Return the spec of an ``attend`` node."""
    return parse(str(node.args[4]))
