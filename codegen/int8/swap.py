"""Swap a model's linear layers for integer ones, in place, and touch nothing that another model shares."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from attnc import logs
from attnc.codegen.int8.linear import W8A8Linear
from attnc.errors import RewriteError

log = logs.get("lower")


def quantize_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Swap the ``nn.Linear`` submodules at dotted paths ``names`` for ``W8A8Linear``; return those names.

    Only the module tree of ``model`` changes: tensors are read and biases shared, so a model that shares its
    tensors with this one is as before.  All names are checked before the first is swapped.

    Raises:
        RewriteError: a name that is no submodule or not exactly an ``nn.Linear``; one with hooks or a
            ``forward`` of its own; a weight that is tied to another, or cannot be quantized.
    """
    made = [(name, W8A8Linear.from_linear(linear)) for name, linear in _checked(model, names)]
    return _swap(model, made)


def prepare_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Swap as ``quantize_modules`` does, for layers of zeros: what a saved state dict is then loaded into.

    Raises:
        RewriteError: as ``quantize_modules``, but weights are not read, and may be on the meta device.
    """
    made = []
    for name, linear in _checked(model, names):
        dtype = linear.weight.dtype
        has_bias, device = linear.bias is not None, linear.weight.device
        new = W8A8Linear(linear.in_features, linear.out_features, has_bias, device, dtype)
        made.append((name, new.train(linear.training)))
    return _swap(model, made)


def _swap(model: nn.Module, made: list[tuple[str, W8A8Linear]]) -> list[str]:
    for name, new in made:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        log.debug("%s: W8A8 linear %d -> %d", name, new.in_features, new.out_features)
    return [name for name, _ in made]


def _checked(model: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Linear]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(key)
    return [(name, _linear(modules, owners, name)) for name in dict.fromkeys(names)]


def _linear(modules: dict[str, nn.Module], owners: dict[int, list[str]], name: str) -> nn.Linear:
    """Return the module called ``name`` if it may be swapped.

    ``type is``, not ``isinstance``: a subclass may compute something else, and ``nn.MultiheadAttention``
    reads the weight of its ``out_proj`` (a subclass) past the module.
    """
    where = f"W8A8: module {name!r}"
    found = modules.get(name)
    if type(found) is not nn.Linear or name == "":
        linears = [k for k, m in modules.items() if type(m) is nn.Linear and k]
        what = "no such module" if found is None else f"a {type(found).__name__}"
        what = "the model itself" if name == "" else what
        some = ", ".join(linears[:6]) + (f" and {len(linears) - 6} more" if len(linears) > 6 else "")
        raise RewriteError(
            f"{where}: expected an nn.Linear inside the model ({some or 'it has none'}), found {what}"
        )
    tied = [key for key in owners.get(id(found.weight), []) if key != f"{name}.weight"]
    if tied:
        raise RewriteError(
            f"{where}: expected a weight of its own, found one tied to {', '.join(tied)}; leave it out"
        )
    hooks = (found._forward_hooks, found._forward_pre_hooks, found._backward_hooks, found._backward_pre_hooks)
    if any(hooks) or "forward" in found.__dict__:
        raise RewriteError(
            f"{where}: expected a plain nn.Linear, found hooks or a forward of its own; remove them first"
        )
    return found
