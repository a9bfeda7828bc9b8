"""Run a model once on its example inputs, leaving no trace, and say where it failed when it does.

A capture that fails can fail because the model itself does.  The user should then read the model's own error,
with the module it came from, and not a tracer's.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from attnc import logs
from attnc.errors import CaptureError

log = logs.get("capture")


class ForwardError(CaptureError):
    """The model's own forward failed on the example inputs."""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the random state and every buffer that has changed, when the block ends."""
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    kept = [(b, b.detach().clone()) for b in model.buffers() if _has_values(b) and not b.is_inference()]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    if not torch.equal(buffer, value):  # batch norm writes without raising the version
                        buffer.copy_(value)


@contextmanager
def noted_functions() -> Iterator[set[str]]:
    """Yield the names of the autograd functions that run inside the block.

    A tracer follows their forward and drops their backward, so that gradients through the graph are others.
    """
    names: set[str] = set()
    kind = torch.autograd.Function
    real = kind.__dict__["apply"]

    def noting(cls: type, *args: Any, **kwargs: Any) -> Any:
        names.add(cls.__name__)
        return real.__func__(cls, *args, **kwargs)

    kind.apply = classmethod(noting)  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        kind.apply = real  # type: ignore[method-assign]


def trial(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run ``model`` once, without gradients, on copies of its inputs.

    On meta and fake tensors, a forward that raises says nothing: it may have asked for a value.

    Raises:
        ForwardError: the model raised; the message holds its own error and the module where it happened.
    """
    given = pytree.tree_leaves((args, kwargs))
    real = all(_has_values(x) for x in (*model.parameters(), *model.buffers(), *given))
    args, kwargs = pytree.tree_map(copied, (args, dict(kwargs)))
    with unchanged(model), torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception as error:  # whatever the model raises is the user's to read
            if not real:
                log.info("%s cannot be tried without values: %s", type(model).__name__, error)
                return
            raise ForwardError(
                f"{type(model).__name__}.forward failed on the example inputs{_where(model, error)}\n"
                f"  expected: a forward that runs on {describe(args, kwargs)}\n"
                f"  found: {type(error).__name__}: {error}\n"
                "  try: call the model on these inputs yourself, and pass inputs that it accepts"
            ) from error


def _has_values(x: object) -> bool:
    return not isinstance(x, FakeTensor) and not (isinstance(x, torch.Tensor) and x.is_meta)


def copied(leaf: Any) -> Any:
    """Copy an argument, since a forward may write to it; caches are copied whole."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the inputs in one line: ``(float32[2, 7], mask=int64[2, 7])``."""

    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(one, value))})"
        text = repr(value)
        return text if len(text) <= 40 else type(value).__name__

    return f"({', '.join([one(a) for a in args] + [f'{k}={one(v)}' for k, v in kwargs.items()])})"


def _where(model: nn.Module, error: BaseException) -> str:
    """Name the innermost module of ``model`` in ``error``'s traceback, with the source line."""
    names = {id(m): n for n, m in model.named_modules()}
    found = ""
    traceback: types.TracebackType | None = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        module = frame.f_locals.get("self")
        inside = isinstance(module, nn.Module) and id(module) in names and not _is_call_plumbing(frame.f_code)
        if inside:
            line = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{traceback.tb_lineno}"
            found = f" in {names[id(module)] or 'the model itself'} ({type(module).__name__}, {line})"
        traceback = traceback.tb_next
    return found


def _is_call_plumbing(code: types.CodeType) -> bool:
    """Say whether ``code`` is torch's own machinery of module calls."""
    return code.co_name in ("_call_impl", "_wrapped_call_impl", "inner")
