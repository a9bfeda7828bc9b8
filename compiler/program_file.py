"""Save a program as ``.pt2`` and open one, as a module with the original's signature.

What is saved is plain ATen without source paths or example data, and the same program gives the same bytes.
What is opened is checked first: ``torch.export.load`` would fall back to unpickling, and a stored graph may
name any function of torch.
"""

from __future__ import annotations

import inspect
import io
import json
import operator
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from attnc.errors import CheckpointError

if TYPE_CHECKING:
    from attnc.opening import Opened

PRIVATE = ("stack_trace",)
UNPICKLED = ("custom_obj_", "opaque_obj_")
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
PLAIN = {getattr(operator, n) for n in dir(operator) if not n.startswith("_")}
PLAIN -= (
    {operator.attrgetter, operator.methodcaller, operator.itemgetter, operator.call}
    if hasattr(operator, "call")
    else set()
)


def save_program(program: ExportedProgram, file: BinaryIO) -> None:
    """Write ``program`` to an open file: no stack traces, no example inputs, a fixed name inside the archive.

    The archive is built in memory first: torch's own writer ends the process when the disk is full.

    Raises:
        CheckpointError: torch cannot serialize it, for instance an output type that is not registered with
            pytree.
    """
    buffer = io.BytesIO()
    with _anonymous(program):
        try:
            torch.export.save(program, buffer)
        except Exception as e:  # of many types; each names what it could not serialize
            raise CheckpointError(
                f"saving the program: torch.export.save failed: {type(e).__name__}: {e}"
            ) from e
    file.write(buffer.getbuffer())


def load_program(path: Path) -> ExportedProgram:
    """Open a ``.pt2`` without running anything in it.

    Raises:
        CheckpointError: not an archive, truncated, holds pickled objects, calls something that is no tensor
            operation, or uses an operator that is not registered here.
    """
    _check_archive(path)
    _register_operators()
    try:
        with _weights_only():
            program = torch.export.load(path)
    except Exception as e:  # torch raises bare errors of many types here; the true reason is in the chain
        raise CheckpointError(f"reading {path}: torch.export.load failed: {_root(e)}") from e
    _check_targets(path, program.graph_module)
    return program


def open_program(path: Path) -> Opened:
    """Open a ``.pt2`` as a model, with inputs of the sizes it was exported at."""
    from attnc.opening import Opened

    program = load_program(path)
    args, kwargs = program.example_inputs or _inputs(program)
    return Opened(program, tuple(args), dict(kwargs), "pt2", path=path)


def signature_of(model: nn.Module, program: ExportedProgram) -> list[dict[str, Any]]:
    """Describe the parameters of a forward as JSON: name, kind, and default where it is a plain value.

    The module of an exported program takes anything; its parameters are the inputs it was captured with.
    """
    if isinstance(model, fx.GraphModule):
        positional, named = _given_names(program, [])
        kinds = ((positional, "POSITIONAL_OR_KEYWORD"), (named, "KEYWORD_ONLY"))
        return [{"name": name, "kind": kind} for names, kind in kinds for name in names]
    out = []
    for p in list(inspect.signature(type(model).forward).parameters.values())[1:]:
        row: dict[str, Any] = {"name": p.name, "kind": p.kind.name}
        if p.default is not p.empty:
            plain = p.default is None or isinstance(p.default, (bool, int, float, str))
            row["default"] = p.default if plain else None
        out.append(row)
    return out


class LoadedProgram(nn.Module):
    """A saved program behind the original forward: arguments by position or name, the same output type.

    Parameters, buffers and ``state_dict`` keys are the original's.
    """

    _program: Any
    _given: tuple[list[str], list[str]]

    def __init__(
        self, program: ExportedProgram, signature: Sequence[Mapping[str, Any]], name: str = "model"
    ) -> None:
        super().__init__()
        module = program.module()
        # The graph runs on its own module; both share their dictionaries, so a move of one moves the other.
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        kinds = inspect.Parameter
        self.__dict__["_program"] = module
        self.__dict__["_name"] = name
        self.__dict__["_given"] = _given_names(program, [p["name"] for p in signature])
        self.__signature__ = inspect.Signature(
            [
                kinds(p["name"], kinds.__dict__[p["kind"]], default=p.get("default", kinds.empty))
                for p in signature
            ]
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on the arguments it was captured with.

        Raises:
            TypeError: an argument is missing, unknown, or was not there when the program was captured.
        """
        positional, named = self._given
        bound = self._bind(args, kwargs)
        missing = [n for n in (*positional, *named) if n not in bound]
        extra = [
            n
            for n, v in bound.items()
            if n not in positional and n not in named and not self._is_default(n, v)
        ]
        if missing or extra:
            what = f"no value for {', '.join(missing)}" if missing else f"also {', '.join(extra)}"
            raise TypeError(
                f"{self._name}: captured with ({', '.join((*positional, *named))}), called with {what}"
            )
        return self._program(*(bound[n] for n in positional), **{n: bound[n] for n in named})

    def extra_repr(self) -> str:
        """Name the model the program was made from."""
        return f"{self._name}{self.__signature__}"

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what was passed, by name: ``*args`` as ``name_0`` and so on, ``**kwargs`` folded in."""
        found = self.__signature__.bind(*args, **kwargs)
        out: dict[str, Any] = {}
        for name, value in found.arguments.items():
            kind = self.__signature__.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                out.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                out.update({f"{name}_{i}": v for i, v in enumerate(value)})
            else:
                out[name] = value
        found.apply_defaults()
        for name in (*self._given[0], *self._given[1]):
            if name in found.arguments:
                out.setdefault(name, found.arguments[name])
        return out

    def _is_default(self, name: str, value: Any) -> bool:
        parameter = self.__signature__.parameters.get(name)
        if value is None:
            return True
        plain = isinstance(value, (bool, int, float, str))
        return (
            plain
            and parameter is not None
            and type(value) is type(parameter.default)
            and value == parameter.default
        )


def _given_names(program: ExportedProgram, names: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of the inputs a program was captured with: by position, by keyword."""
    args_spec, kwargs_spec = program.call_spec.in_spec.children()
    named = list(kwargs_spec.context or ())
    arg_names = program.module_call_graph[0].signature
    recorded = list(getattr(arg_names, "forward_arg_names", None) or ())
    count = args_spec.num_children
    positional = recorded[:count] if len(recorded) >= count else names[:count]
    return positional, named


@contextmanager
def _anonymous(program: ExportedProgram) -> Iterator[None]:
    """Take source paths and example data out of a program for the length of a block."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            held += [(node.meta, key, node.meta.pop(key)) for key in PRIVATE if key in node.meta]
    examples, program._example_inputs = program._example_inputs, None
    try:
        yield
    finally:
        program._example_inputs = examples
        for meta, key, value in held:
            meta[key] = value


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every ``torch.load`` of a block refuse pickles, torch's own fallback among them."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def _register_operators() -> None:
    """Make the operators known that a program of ours may call."""
    from attnc.codegen import int8, ops

    assert int8.linear_w8a8 is not None, "registered on import"
    assert ops.execute is not None, "registered on import"


def _check_archive(path: Path) -> None:
    """Refuse what is no archive, is truncated, or holds objects that could only be unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            configs = [n for n in archive.namelist() if n.endswith("_config.json")]
            texts = [archive.read(n) for n in configs]
            objects = [n for n in archive.namelist() if n.rpartition("/")[2].startswith(UNPICKLED)]
    except (zipfile.BadZipFile, OSError, EOFError) as e:
        raise CheckpointError(
            f"reading {path}: expected a .pt2 archive, found a truncated or corrupt file ({e})"
        ) from None
    if bad is not None:
        raise CheckpointError(f"reading {path}: {bad} does not match its checksum; the file is corrupt")
    for name, text in zip(configs, texts, strict=True):
        rows = json.loads(text).get("config", {})
        objects += [
            f"{name}: {key}"
            for key, row in rows.items()
            if str(row.get("path_name", "")).startswith(UNPICKLED)
        ]
    if objects:
        raise CheckpointError(
            f"reading {path}: expected tensors only, found a pickled object in {objects[0]}; attnc never "
            "unpickles"
        )


def _check_targets(path: Path, module: fx.GraphModule) -> None:
    """Refuse a graph that calls anything but operators, arithmetic, and higher-order operators."""
    for inner in module.modules():
        for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
            if node.op == "call_function" and not _is_operation(node.target):
                raise CheckpointError(
                    f"reading {path}: node {node.name} calls {node.target!r}, which is no tensor operation; "
                    "refused"
                )


def _is_operation(target: Any) -> bool:
    if (
        isinstance(
            target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
        )
        or target in PLAIN
    ):
        return True
    home, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    return home in ("math", "torch.fx.experimental.sym_node") or (
        home in ("torch", "torch._C") and name.startswith(("sym_", "_sym_", "_set_grad"))
    )


def _inputs(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make inputs at the sizes a program was exported with."""
    from torch.utils import _pytree as pytree

    from attnc.examples import from_recipe

    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    generator = torch.Generator().manual_seed(0)
    leaves: list[Any] = []
    for name in program.graph_signature.user_inputs:
        value = values.get(name) if isinstance(name, str) else name
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            row = {"shape": [_size(n) for n in value.shape], "dtype": dtype, "low": 0, "high": 1}
            value = from_recipe({"tensor": row}, generator)
        leaves.append(value)
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def _size(n: Any) -> int:
    """Return a size in the example the program was exported with."""
    return int(n.node.hint if isinstance(n, torch.SymInt) else n)


def _root(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
