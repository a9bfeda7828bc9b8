"""Derivatives of ``attnc::attend`` in both modes, and of each in the other, by operators of their own.

``attend_tangent`` returns ``attend``'s results and their tangents in one pass, ``attend_tangent_backward``
the gradients of that.  With ``attend_backward`` these are all derivatives up to the second order: the tangent
of a backward pass, and a backward pass through one, are those of a tangent with arguments in other places.

The classes and functions below connect them: what Autograd calls in place of each operator, at every level of
nested transforms, and the nodes of the graph in reverse mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnc.codegen.calls import work_dtype
from attnc.codegen.operators import (
    Below,
    Node,
    is_recorded,
    operator,
    record,
    tangent_of,
    with_tangent,
    without_tangent,
)
from attnc.codegen.tangents import Results, tangent, tangent_gradients
from attnc.errors import UnsupportedError
from attnc.printer import parse

_TANGENT = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] captured, Tensor[] tangents, bool[] given, str spec,"
    " Tensor? seed=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor? dout, Tensor? dlse, Tensor? dtout, Tensor? dtlse, Tensor q, Tensor k, Tensor v,"
    " Tensor[] captured, Tensor[] tangents, bool[] given, Tensor out, Tensor lse, Tensor tout, Tensor tlse,"
    " str spec, bool[] needs, Tensor? seed=None) -> Tensor[]"
)


@operator("attend_tangent", _TANGENT)
def attend_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor],
    given: Sequence[bool],
    spec: str,
    seed: Tensor | None = None,
) -> Results:
    """Return out and lse of ``attend``, and their tangents.

    ``tangents`` are those of (q, k, v, *captured) that ``given`` marks, in that order; the others are zeros.
    """
    return tangent(parse(spec), q, k, v, captured, _spread(tangents, given), seed)


def _spread(found: Sequence[Tensor], given: Sequence[bool]) -> list[Tensor | None]:
    """Return the next of ``found`` where ``given`` is true, else None."""
    rest: Iterator[Tensor] = iter(found)
    return [next(rest) if g else None for g in given]


@attend_tangent.register_fake
def _tangent_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor],
    given: Sequence[bool],
    spec: str,
    seed: Tensor | None = None,
) -> Results:
    b, h, sq, _ = q.shape
    out, lse = (b, h, sq, v.shape[3]), (b, h, sq)
    work = work_dtype(q)
    return q.new_empty(out), q.new_empty(lse, dtype=work), q.new_empty(out), q.new_empty(lse, dtype=work)


@attend_tangent.register_kernel("cuda")
def _tangent_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor],
    given: Sequence[bool],
    spec: str,
    seed: Tensor | None = None,
) -> Results:
    """Run the emitted Triton kernel, or plain torch where none can serve the spec."""
    from attnc.codegen.triton.launch import run_tangent

    return run_tangent(parse(spec), q, k, v, captured, _spread(tangents, given), seed)


@operator("attend_tangent_backward", _BACKWARD)
def attend_tangent_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dtout: Tensor | None,
    dtlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor],
    given: Sequence[bool],
    out: Tensor,
    lse: Tensor,
    tout: Tensor,
    tlse: Tensor,
    spec: str,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of (q, k, v, *captured) and of their tangents, those that ``needs`` marks.

    ``out`` .. ``tlse`` are the results of ``attend_tangent`` and ``dout`` .. ``dtlse`` their gradients, None
    for zeros.  ``needs`` marks the tensors first, then the tangents, also those that were not given.
    """
    inputs = (q, k, v, *captured)
    duals = tangent_gradients(
        parse(spec), q, k, v, captured, _spread(tangents, given), dout, dlse, dtout, dtlse, seed
    )
    grads = [*((d.tangent, d.value) for d in duals), *((d.value, d.value) for d in duals)]
    found = []
    for x, (gradient, like), need in zip((*inputs, *inputs), grads, needs, strict=True):
        if need:
            made = torch.zeros_like(like) if gradient is None else gradient
            found.append(made.to(x.dtype, memory_format=torch.contiguous_format, copy=True))
    return found


@attend_tangent_backward.register_fake
def _tangent_backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    dtout: Tensor | None,
    dtlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor],
    given: Sequence[bool],
    out: Tensor,
    lse: Tensor,
    tout: Tensor,
    tlse: Tensor,
    spec: str,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    inputs = (q, k, v, *captured)
    pairs = zip((*inputs, *inputs), needs, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, need in pairs if need]


attend_tangent.register_vmap_loop()
attend_tangent_backward.register_vmap_loop()


def _tangent(
    inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], spec: str, seed: Tensor | None
) -> Results:
    """Call ``attend_tangent`` with tangents where there are any."""
    given = [t is not None for t in tangents]
    found: Results = torch.ops.attnc.attend_tangent(
        *inputs[:3], inputs[3:], [t for t in tangents if t is not None], given, spec, seed
    )
    return found


def _tangent_backward(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    results: Results,
    spec: str,
    needs: Sequence[bool],
    seed: Tensor | None,
) -> list[Tensor | None]:
    """Call ``attend_tangent_backward`` and return a gradient, or None, for each flag in ``needs``."""
    given = [t is not None for t in tangents]
    moved = [t for t in tangents if t is not None]
    if not any(needs) or all(g is None for g in grads):
        return [None] * len(needs)
    found = torch.ops.attnc.attend_tangent_backward(
        *grads, *inputs[:3], inputs[3:], moved, given, *results, spec, needs, seed
    )
    return _spread(found, needs)


class _Attend(Node):
    """``attend`` in a graph."""

    @staticmethod
    def forward(below: Below, spec: str, seed: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = below(*inputs[:3], list(inputs[3:]), spec, seed)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.spec, seed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, seed, *tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        if dout is None and dlse is None:
            return (None, None, None, *(None for _ in needs))
        out, lse, seed, q, k, v, *captured = ctx.saved_tensors
        found = torch.ops.attnc.attend_backward(
            dout, dlse, q, k, v, captured, out, lse, ctx.spec, needs, seed
        )
        return None, None, None, *_spread(found, needs)


def attend_autograd(
    below: Below,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    spec: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiate ``attend``."""
    inputs = (q, k, v, *captured)
    tangents = [tangent_of(x) for x in inputs]
    if any(t is not None for t in tangents):
        out, lse, tout, tlse = _tangent([without_tangent(x) for x in inputs], tangents, spec, seed)
        return with_tangent(out, tout), with_tangent(lse, tlse)
    if is_recorded(*inputs):
        out, lse = record(_Attend, below, spec, seed, *inputs)
    else:
        out, lse = below(q, k, v, captured, spec, seed)
    return out, lse


class _Backward(Node):
    """``attend_backward`` in a graph."""

    @staticmethod
    def forward(
        below: Below,
        spec: str,
        needs: Sequence[bool],
        dout: Tensor | None,
        dlse: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        seed: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(below(dout, dlse, *inputs[:3], list(inputs[3:]), out, lse, spec, needs, seed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.spec, ctx.needs, dout, dlse, _, _, seed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dout, dlse, seed, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """With L = <grads, J(x)^T dout> = <J(x) grads, dout>: gradients of a tangent along ``grads``.

        The forward's results are functions of the inputs, which get all of the gradient.
        """
        dout, dlse, seed, *inputs = ctx.saved_tensors
        wants_dout, wants_dlse, _, _, _, *wanted = ctx.needs_input_grad[3:]
        rest = iter(grads)
        tangents = [next(rest) if need else None for need in ctx.needs]
        if all(t is None for t in tangents):
            return (None,) * (8 + len(inputs))
        results = _tangent(inputs, tangents, ctx.spec, seed)
        needs = [*wanted, *(False for _ in wanted)]
        found = _tangent_backward((None, None, dout, dlse), inputs, tangents, results, ctx.spec, needs, seed)
        _, _, tout, tlse = results
        return (
            *(None, None, None),
            tout if wants_dout else None,
            tlse if wants_dlse else None,
            *(None, None, None),
            *found[: len(inputs)],
        )


def attend_backward_autograd(
    below: Below,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor | None,
    lse: Tensor | None,
    spec: str,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Differentiate ``attend_backward``."""
    inputs = (q, k, v, *captured)
    tangents = [tangent_of(x) for x in inputs]
    moved = [tangent_of(x) for x in (dout, dlse)]
    if any(t is not None for t in (*tangents, *moved)):
        inputs = tuple(without_tangent(x) for x in inputs)
        dout, dlse = (None if x is None else without_tangent(x) for x in (dout, dlse))
        results = _tangent(inputs, tangents, spec, seed)
        needs = [*needs, *needs]
        found = _tangent_backward((*moved, dout, dlse), inputs, tangents, results, spec, needs, seed)
        half = len(needs) // 2
        pairs = zip(found[half:], found[:half], strict=True)
        return [with_tangent(g, t) for g, t in pairs if g is not None and t is not None]
    if is_recorded(dout, dlse, *inputs):
        return list(record(_Backward, below, spec, needs, dout, dlse, out, lse, seed, *inputs))
    plain: list[Tensor] = below(dout, dlse, q, k, v, captured, out, lse, spec, needs, seed)
    return plain


class _Tangent(Node):
    """``attend_tangent`` in a graph."""

    @staticmethod
    def forward(
        below: Below, spec: str, given: Sequence[bool], seed: Tensor | None, *tensors: Tensor
    ) -> Results:
        inputs, moved = tensors[: len(given)], tensors[len(given) :]
        found: Results = below(*inputs[:3], list(inputs[3:]), list(moved), given, spec, seed)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        _, ctx.spec, ctx.given, seed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, seed, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, tout, tlse, seed, *tensors = ctx.saved_tensors
        inputs, tangents = tensors[: len(ctx.given)], _spread(tensors[len(ctx.given) :], ctx.given)
        wanted = ctx.needs_input_grad[4:]
        of_tangents = iter(wanted[len(inputs) :])
        needs = [*wanted[: len(inputs)], *(next(of_tangents) if g else False for g in ctx.given)]
        results = (out, lse, tout, tlse)
        found = _tangent_backward(grads, inputs, tangents, results, ctx.spec, needs, seed)
        pairs = zip(found[len(inputs) :], ctx.given, strict=True)
        return None, None, None, None, *found[: len(inputs)], *(f for f, g in pairs if g)


@attend_tangent.register_autograd
def _tangent_autograd(
    below: Below,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor],
    given: Sequence[bool],
    spec: str,
    seed: Tensor | None = None,
) -> Results:
    tensors = (q, k, v, *captured, *tangents)
    if any(tangent_of(x) is not None for x in tensors):
        _refuse("a tangent of a tangent")
    found: Results
    if is_recorded(*tensors):
        found = record(_Tangent, below, spec, given, seed, *tensors)
    else:
        found = below(q, k, v, captured, tangents, given, spec, seed)
    return found


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"attnc::attend: expected at most two derivatives, one of them in reverse mode, found {what}\n"
        "  try: attnc.codegen.ops.execute, the same function in differentiable torch"
    )


class _TangentBackward(Node):
    """``attend_tangent_backward`` in a graph, where it ends."""

    @staticmethod
    def forward(below: Below, args: Sequence[Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(below(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        _refuse("a gradient of the gradient of a tangent")


@attend_tangent_backward.register_autograd
def _tangent_backward_autograd(below: Below, *args: Any) -> list[Tensor]:
    lists = [x for x in args if isinstance(x, (list, tuple))]
    tensors = [x for x in (*args, *(y for x in lists for y in x)) if isinstance(x, Tensor)]
    if any(tangent_of(x) is not None for x in tensors):
        _refuse("a tangent of the gradient of a tangent")
    if is_recorded(*tensors):
        return list(record(_TangentBackward, below, args, *tensors))
    found: list[Tensor] = below(*args)
    return found
