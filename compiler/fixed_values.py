"""Fix the values that a model turns into sizes, where a program with free ones cannot be captured.

A vision tower reads the grid of each image from a tensor (``grid_thw.tolist()``) and makes sizes of it, which
no exporter follows.  With those few numbers fixed it is one program, for images of that grid.  Which inputs
they are is seen in a run of the model, not guessed: those whose values, or what is computed of them, Python
turns into numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from attnc.capture.trial import unchanged
from attnc.forwards import bound_arguments, with_forward

MOST_VALUES = 64
"""An input of more elements is data, and not the sizes of some."""

MOST_CONSTANTS = 4096
"""Elements up to which torch carries what is computed of a constant as a constant; its own limit is 1."""

_READS = frozenset(("tolist", "item", "__int__", "__index__", "repeat_interleave"))


class _Reads(TorchFunctionMode):
    """While it is on, note which inputs Python reads as numbers, themselves or through other integers."""

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._of = {id(x): frozenset((name,)) for name, x in inputs.items()}
        self._alive: list[Any] = list(inputs.values())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, and pass on what its integer results come from."""
        given = [x for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        sources = frozenset[str]().union(*(self._of.get(id(x), frozenset()) for x in given))
        if sources and getattr(func, "__name__", "") in _READS:
            self.read |= sources
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out) if sources else ():
            if isinstance(x, torch.Tensor) and not x.is_floating_point():
                self._of[id(x)] = sources
                self._alive.append(x)
        return out


def fix_values(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]] | None:
    """Return ``model`` without the inputs that it turns into sizes, the other inputs, and the values fixed.

    None if there are no such inputs: integers, ``MOST_VALUES`` at most in each.

    Raises:
        CaptureError: the inputs do not fit the model's forward.
    """
    named = bound_arguments(model, args, kwargs)
    small = {n: x for n, x in named.items() if _is_small(x)}
    with unchanged(model), torch.no_grad(), _Reads(small) as reads:
        type(model).forward(model, **named)  # what ``optimize`` compiled is not to be watched
    values = {n: small[n].tolist() for n in sorted(reads.read)}
    if not values:
        return None
    kinds = {n: (small[n].dtype, small[n].device) for n in values}

    def call(base: Any, module: nn.Module, inputs: dict[str, Any]) -> Any:
        fixed = {n: torch.tensor(v, dtype=kinds[n][0], device=kinds[n][1]) for n, v in values.items()}
        return base.forward(module, **inputs, **fixed)

    rest = {n: x for n, x in named.items() if n not in values}
    return with_forward(model, tuple(rest), call), rest, values


def _is_small(x: object) -> bool:
    whole = isinstance(x, torch.Tensor) and not (x.is_floating_point() or x.is_complex())
    return whole and isinstance(x, torch.Tensor) and x.dtype != torch.bool and 0 < x.numel() <= MOST_VALUES


@contextmanager
def followed_constants() -> Iterator[None]:
    """Let torch.export know the values of whatever is computed from constants alone."""
    import torch._subclasses.fake_tensor as fake
    import torch.fx.experimental.proxy_tensor as proxy

    with ExitStack() as stack:
        for module in (fake, proxy):
            if hasattr(module, "CONSTANT_NUMEL_LIMIT"):  # private, and the same in torch 2.11 to 2.13
                stack.enter_context(mock.patch.object(module, "CONSTANT_NUMEL_LIMIT", MOST_CONSTANTS))
        yield
