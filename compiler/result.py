"""Build what ``optimize`` returns: a clone of the user's module, on its tensors; its ``forward`` dispatches.

The clone is an ordinary module: ``isinstance``, ``.config``, state dict keys, ``.train()``, ``.to()``, hooks
on itself and ``save_pretrained`` are the class's own.  Only its instance attribute ``forward`` is ours.  It
runs a captured program where one is valid for the call, captures a new one where none is, and runs the
class's own forward in every other case: opaque arguments (caches), hooks on submodules, a capture that fails,
too many kinds of call.

A program knows the modules' ``training`` flags and tree, the weights' dtypes and devices, the arguments and
autocast. It does not see other Python attributes change, such as ``model.dropout.p = 0.2`` after the first
call.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnc import logs
from attnc.capture.key import HOOKS, Tree, being_traced, harmless, in_forward_mode, kind, opaque
from attnc.capture.program import Program
from attnc.capture.trial import ForwardError
from attnc.errors import CaptureError
from attnc.result_ladder import Doors, Ladder
from attnc.result_lazy import InstanceForward, LazyForward

log = logs.get("capture")

Build = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], "ExportedProgram | None"]
MAX_PROGRAMS = 8
_CAPTURING = threading.RLock()  # torch.export sets flags of the whole process


class HasWarnings(Protocol):
    """Anything that keeps the user's warnings, as Report does."""

    warnings: list[str]


def clone_module(model: nn.Module) -> nn.Module:
    """Copy ``model`` and its submodules, sharing every tensor: same class, same keys, no doubled memory.

    Raises:
        CaptureError: something the module holds cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in _tensors(model)}
    ours = [n for n, m in model.named_modules() if isinstance(vars(m).get("forward"), InstanceForward)]
    memo |= {id(vars(model.get_submodule(n))["forward"]): None for n in ours}
    try:
        clone = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the copied attributes raise
        raise CaptureError(
            f"{type(model).__name__}: expected a module that can be copied, as it is never changed;\n"
            f"  found {type(error).__name__}: {error}"
        ) from error
    for name in ours:
        clone.get_submodule(name).__dict__.pop("forward", None)  # a GraphModule does not copy it
    return clone


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield every tensor that a module of the tree holds as parameter, buffer or plain attribute."""
    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            yield from (t for t in holder.values() if isinstance(t, torch.Tensor))


def make_result(
    model: nn.Module,
    build: Build | None,
    *,
    lazy: Callable[..., Any] | None = None,
    fallback: Doors | None = None,
    report: HasWarnings,
) -> nn.Module:
    """Return a clone of ``model`` that runs captured programs; ``model`` itself is never changed.

    ``build(plain_clone, args, kwargs)`` captures and edits a program for one kind of call; None means that
    the class's own forward is to be used for it.  With ``lazy``, a Dynamo backend, the forward is compiled
    piece by piece instead. ``fallback`` serves the kinds of call whose capture as a whole fails.

    Raises:
        CaptureError: the module cannot be copied, or its ``forward`` was replaced on the instance.
    """
    if "forward" in vars(model) and not isinstance(vars(model)["forward"], InstanceForward):
        raise CaptureError(
            f"{type(model).__name__}: expected the class's own forward, found one set on the instance\n"
            "  try: pass the module as it was before torch.compile or accelerate wrapped it, for example"
        )
    clone = clone_module(model)
    forward: Dispatcher | LazyForward
    if lazy is not None:
        forward = LazyForward(clone, lazy)
    else:
        assert build is not None, "make_result needs build or lazy"
        forward = Dispatcher(clone, build, report, fallback)
    clone.__dict__["forward"] = forward
    if hasattr(clone, "report") and "report" not in vars(clone):
        report.warnings.append(f"{type(model).__name__} has an attribute 'report' of its own, which is kept")
    else:
        clone.__dict__["report"] = report
    return clone


class Dispatcher(InstanceForward):
    """Choose, for each call, a captured program or the class's own forward."""

    def __init__(
        self, model: nn.Module, build: Build, report: HasWarnings, fallback: Doors | None = None
    ) -> None:
        super().__init__(model)
        self._build = build
        self._doors = fallback
        self._ladder = None
        if fallback is not None:
            self._ladder = Ladder(
                model, fallback, plain=self._plain_clone, prepare=self._prepare_piece, tell=self._tell
            )
        self._report = report
        self._told: set[str] = set()
        parameters = self.__signature__.parameters.values()
        self._positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        self._only_positional = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
        self._named = {
            p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        self._takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._inherited: tuple[tuple[Any, ExportedProgram], ...] = ()
        self._tree: Tree | None = None
        self._programs: tuple[tuple[Any, Program], ...] = ()
        self._original_keys: set[Any] = set()
        self._failed_keys: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the call as the class's forward would, by a captured program where one is valid."""
        call = self._canonical(args, kwargs)
        tree = self._current_tree()
        if call is None or tree is None:
            return self._original(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(call, is_leaf=_is_no_container)
        kinds = tuple([kind(leaf) for leaf in leaves])
        if None in kinds:
            self._tell(f"a call with an argument of type {opaque(leaves)} runs the original forward")
            return self._original(*args, **kwargs)
        key = (spec, kinds, tree.state())
        program = self._find(key, leaves)
        if in_forward_mode():
            return self._with_tangents(program, leaves, args, kwargs)
        if program is None and not being_traced():
            program = self._capture(key, leaves, call)
            if program is not None and not program.loses_gradients(leaves):
                try:
                    return program(leaves)
                except Exception as error:  # torch exports graphs that do not run, around vmap for one
                    self._discard(program, key, error)
                    program = None
        if program is not None and not program.loses_gradients(leaves):
            return program(leaves)
        if self._ladder is not None and not being_traced() and (program or key in self._failed_keys):
            return self._ladder(key, args, kwargs)
        return self._original(*args, **kwargs)

    def _with_tangents(
        self, program: Program | None, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call whose tensors may carry tangents; nothing is captured from it."""
        differentiable = None
        try:
            if program is not None and not program.loses_gradients(leaves):
                differentiable = program.in_forward_mode()
        except Exception as error:  # a mistake of ours must not take the user's model down
            self._tell(f"the original forward runs in forward mode: {type(error).__name__}: {error}")
        return self._original(*args, **kwargs) if differentiable is None else differentiable(leaves)

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Capture for this kind of call, if that has not been done; return why it cannot be, '' if it can."""
        call, tree = self._canonical(args, kwargs), self._current_tree()
        if call is None or tree is None:
            return "its call does not fit its signature, or it has hooks"
        leaves, spec = pytree.tree_flatten(call, is_leaf=_is_no_container)
        kinds = tuple([kind(leaf) for leaf in leaves])
        if None in kinds:
            return f"it is called with an argument of type {opaque(leaves)}"
        key = (spec, kinds, tree.state())
        if self._find(key, leaves) is not None:
            return ""
        try:
            exported = self._build(self._plain_clone(), *call)
        except CaptureError as error:
            return _reason(error)
        program = None if exported is None else Program(exported, self._model)
        if program is not None and program.valid(leaves):
            self._programs = (*self._programs, (key, program))
        return ""

    @property
    def has_programs(self) -> bool:
        """Whether any program was captured."""
        return bool(self._programs)

    def _prepare_piece(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Give the submodule at ``path`` a dispatcher with a program for this kind of call."""
        module = self._model.get_submodule(path)
        forward = vars(module).get("forward")
        if self._doors is None or self._doors.piece is None or not isinstance(forward, Dispatcher | None):
            return "its forward was replaced on the instance"
        build = functools.partial(self._doors.piece, path)
        dispatcher = Dispatcher(module, build, self._report) if forward is None else forward
        reason = dispatcher.prepare(args, kwargs)
        if dispatcher.has_programs:
            module.__dict__["forward"] = dispatcher
        return reason

    def _discard(self, program: Program, key: Any, error: Exception) -> None:
        """Forget a program that raised where it was first run."""
        self._programs = tuple(p for p in self._programs if p[1] is not program)
        self._original_keys.add(key)
        self._failed_keys.add(key)
        self._tell(f"a captured program is not used, because it raised {type(error).__name__}: {error}")

    def _canonical(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Any] | None:
        """Return ``(args, kwargs)`` in one form for all ways to write the call; None if it does not fit.

        An argument that is None where None is the default is left out.
        """
        if len(args) > len(self._positional):
            return (args, dict(kwargs)) if self._takes_more else None
        given = dict(
            zip(self._positional[self._only_positional :], args[self._only_positional :], strict=False)
        )
        for name in kwargs:
            if name in given or not (name in self._named or self._takes_any):
                return None
        given.update(kwargs)
        named = {
            n: given[n]
            for n, default in self._named.items()
            if n in given and not (given[n] is None and default is None)
        }
        named.update({n: given[n] for n in sorted(given) if n not in self._named})
        return args[: self._only_positional], named

    def _current_tree(self) -> Tree | None:
        """Return the module tree if programs may run on it now; None if the class's forward must run."""
        tree = self._tree
        if being_traced():
            return tree
        if tree is None or tree.changed():
            tree = self._look_again()
        hooked = tree.hooked()
        if hooked is not None:
            self._tell(
                f"{hooked} has hooks, which a captured program would not call: the original forward runs"
            )
            return None
        return None if torch._C._get_tracing_state() else tree

    def _look_again(self) -> Tree:
        """Look at the module tree anew: programs of another tree are dropped, inherited ones are bound."""
        with _CAPTURING:
            if self._tree is None or self._tree.changed():
                self._tree = Tree(self._model)
                self._programs = tuple((key, Program(e, self._model)) for key, e in self._inherited)
                self._inherited = ()
                self._original_keys.clear()
                self._failed_keys.clear()
            return self._tree

    def _capture(self, key: Any, leaves: Sequence[Any], call: tuple[tuple[Any, ...], Any]) -> Program | None:
        """Capture a program for this call; None if the class's own forward has to serve this kind of call."""
        with _CAPTURING:
            program = self._find(key, leaves)
            if program is not None or key in self._original_keys:
                return program
            if len(self._programs) >= MAX_PROGRAMS:
                self._tell(
                    f"{MAX_PROGRAMS} programs are captured; further kinds of call run the original forward"
                )
                return None
            program = self._build_program(key, leaves, call)
            if program is None:
                return None
            self._programs = (*self._programs, (key, program))
            return program

    def _build_program(
        self, key: Any, leaves: Sequence[Any], call: tuple[tuple[Any, ...], Any]
    ) -> Program | None:
        """Capture and edit a program for this call; remember the kind of call if that cannot be had."""
        try:
            exported = self._build(self._plain_clone(), *call)
        except ForwardError:  # the caller runs the original forward, which raises the model's own error
            return None
        except CaptureError as error:
            served = (
                "the original forward runs"
                if self._ladder is None
                else "the forward is compiled piece by piece"
            )
            self._tell(f"{served}, because capture failed: {error}")
            self._original_keys.add(key)
            self._failed_keys.add(key)
            return None
        program = None if exported is None else Program(exported, self._model)
        if program is not None and not program.valid(leaves):
            self._tell(
                "the original forward runs, because a program was not valid for the call it was captured from"
            )
            program = None
        if program is None:
            self._original_keys.add(key)
        return program

    def _find(self, key: Any, leaves: Sequence[Any]) -> Program | None:
        """Return the first program for this kind of call that is valid for these sizes.

        Compares and does not hash, since an outer torch.compile traces this.
        """
        for known, program in self._programs:
            if known == key and program.valid(leaves):
                return program
        return None

    def _plain_clone(self) -> nn.Module:
        """Return the module as the class made it: without this forward and the hooks around it."""
        plain = clone_module(self._model)
        if vars(self._model).get("report") is self._report:
            plain.__dict__.pop("report", None)
        for name in HOOKS:
            hooks = getattr(plain, name)
            for number in [n for n, hook in hooks.items() if not harmless(hook)]:
                del hooks[number]
        return plain

    def _tell(self, text: str) -> None:
        """Add one warning to the report, once."""
        if being_traced() or text in self._told:
            return
        with _CAPTURING:
            self._told.add(text)
            log.warning("%s: %s", type(self._model).__name__, text)
            self._report.warnings.append(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        """Bind the same programs to the copied module, which is complete only when it is first called."""
        model = memo.get(id(self._model), self._model)
        other = Dispatcher(model, self._build, copy.deepcopy(self._report, memo), self._doors)
        with _CAPTURING:
            other._inherited = self._inherited + tuple((key, p.exported) for key, p in self._programs)
        return other


def _reason(error: CaptureError) -> str:
    """Return in one line why a capture failed: what torch said, where it did."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"{type(cause).__name__}: {lines[0]}"


def _is_no_container(value: object) -> bool:
    """Say whether ``value`` is passed as one thing.

    Caches are, although torch can be taught to take them apart: a forward writes to the cache it is given,
    and a program would write to a new one.
    """
    return not isinstance(value, (tuple, list, dict))
