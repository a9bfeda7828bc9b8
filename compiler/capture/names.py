"""Find where the pieces that Dynamo compiles live in the model, and what of the model they cover.

Dynamo compiles frames.  A frame of a submodule names its parts from that submodule on, and one compiled frame
may serve many layers.  Parameters tell which: they are inputs of the graph, their sources name them within
the frame, and their identity names them within the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from attnc.capture.types import Captured

_ROOT = re.compile(r"^[LG]\['\w+'\]")
_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_FLEX = "flex_attention"
Reused = Callable[[Sequence[Captured], str, str], None]
Named = Callable[[str, str, str], None]


def source_name(placeholder: fx.Node) -> str:
    """Return Dynamo's name for where an input comes from, ``L['self']._modules['a']``; '' if unknown."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def qualified(source: str) -> str:
    """Return the dotted name of a weight within its frame, '' if ``source`` is none."""
    return ".".join(_PART.findall(source))


@dataclass(frozen=True)
class Frame:
    """A compiled frame: the module it is a method of, and the input that tells so at each call."""

    prefix: str
    root: str
    position: int
    suffix: str


@dataclass
class Watch:
    """What the Dynamo door was given of one model.

    Attributes:
        model: the model that is run; None if unknown.
        modules: path of each module with nodes in some graph -> '' if it was captured, else why not.
        graphs: how many graphs there were.
        reused: told when a compiled frame runs for another module: captures, old and new path of the module.
        named: told about a fused call in a graph that was not captured: path of its module, source, reason.
    """

    model: nn.Module | None = None
    modules: dict[str, str] = field(default_factory=dict)
    graphs: int = 0
    reused: Reused | None = None
    named: Named | None = None

    def enter(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Frame | None:
        """Count the graph and give its nodes the paths that their modules have in the model."""
        self.graphs += 1
        frame = self._frame(gm, inputs)
        _rename(gm, frame, self._kind(frame))
        return frame

    def add(self, gm: fx.GraphModule, frame: Frame | None, reason: str) -> None:
        """Note that the modules with nodes in ``gm`` are captured, or why not."""
        for path in {*_paths(gm), *([frame.prefix] if frame is not None else [])}:
            if self.modules.get(path) != "":
                self.modules[path] = reason
        if reason and self.named is not None:
            for node in gm.graph.nodes:
                if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == _FLEX:  # type: ignore[no-untyped-call]
                    path = next(reversed([str(p) for p, _ in _stack(node).values()]), "")
                    self.named(path, "", "already-fused: the model calls flex_attention here")

    def captured(self, path: str) -> bool:
        """Say whether some captured graph holds nodes of this module."""
        return self.modules.get(path) == ""

    def following(
        self, run: Callable[..., Any], frame: Frame, made: Sequence[Captured]
    ) -> Callable[..., Any]:
        """Wrap ``run``, which notes the modules other than its own that it comes to serve."""
        seen: set[int] = set()

        def call(*inputs: Any) -> Any:
            if id(inputs[frame.position]) not in seen:
                seen.add(id(inputs[frame.position]))
                self._serve(inputs[frame.position], frame, made)
            return run(*inputs)

        return call

    def _serve(self, witness: Any, frame: Frame, made: Sequence[Captured]) -> None:
        for name in self._names().get(id(witness), []):
            prefix = _without(name, frame.suffix)
            if prefix is None or prefix == frame.prefix:
                continue
            for path in [p for p in self.modules if _inside(p, frame.prefix)]:
                self.modules.setdefault(moved(path, frame.prefix, prefix), self.modules[path])
            if self.reused is not None:
                self.reused(made, frame.prefix, prefix)

    def _frame(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Frame | None:
        """Find the frame's module by the first of its parameters that the model has."""
        names = self._names()
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for i, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
            source = source_name(node)
            root, suffix = _ROOT.match(source), qualified(source)
            prefixes = [_without(n, suffix) for n in names.get(id(value), [])] if root and suffix else []
            known = [p for p in prefixes if p is not None]
            if root and known:
                return Frame(known[0], root[0], i, suffix)
        return None

    def _names(self) -> dict[int, list[str]]:
        if self.model is None:
            return {}
        names: dict[int, list[str]] = {}
        for named in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(name)
        return names

    def _kind(self, frame: Frame | None) -> str:
        if frame is None or self.model is None:
            return ""
        return type(self.model.get_submodule(frame.prefix)).__name__


def _without(name: str, suffix: str) -> str | None:
    """Return ``name`` without ``suffix`` at its end, None if it does not end so."""
    if name == suffix:
        return ""
    return name[: -len(suffix) - 1] if name.endswith("." + suffix) else None


def _inside(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def moved(path: str, old: str, new: str) -> str:
    """Return a path at or below ``old`` as the path at or below ``new``; others stay.

    >>> moved("layers.0.attention#2", "layers.0", "layers.1")
    'layers.1.attention#2'
    """
    if not path.startswith(old):
        return path
    rest = path[len(old) :]
    return new + rest if rest.startswith(("#", ".")) or not rest else path


def _rename(gm: fx.GraphModule, frame: Frame | None, kind: str) -> None:
    """Give each node's module stack dotted paths from the model on; a frame's own nodes get its path."""
    for node in gm.graph.nodes:
        new = {key: (_dotted(str(path), frame), cls) for key, (path, cls) in _stack(node).items()}
        if not new and frame is not None and frame.prefix and node.op.startswith("call"):
            new = {"frame": (frame.prefix, kind)}
        if new:
            node.meta["nn_module_stack"] = new
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            _rename(child, frame, kind)


def _dotted(path: str, frame: Frame | None) -> str:
    root = _ROOT.match(path)
    rest = path[len(root[0]) :] if root else path
    name = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", rest).replace("_modules.", "").strip(".")
    name = name.removeprefix("__self__").strip(".")  # of a bound method that is called
    ours = frame is not None and root is not None and root[0] == frame.root
    return ".".join(filter(None, (frame.prefix, name))) if ours and frame is not None else name


def _stack(node: fx.Node) -> Mapping[str, Any]:
    return node.meta.get("nn_module_stack") or {}


def _paths(gm: fx.GraphModule) -> Iterator[str]:
    """Yield the paths of the modules that have nodes in ``gm``, its bodies apart."""
    for node in gm.graph.nodes:
        if node.op.startswith("call"):
            yield from (str(path) for path, _ in _stack(node).values())
            if not _stack(node):
                yield ""
