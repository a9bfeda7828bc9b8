"""Turn an exported program into an ONNX model in which every operator of ours is one opaque node.

The opaque nodes, ``attnc::Attend`` and ``attnc::LinearW8A8``, are written afterwards by ``assemble``; so
conversion happens once, whatever the sites become, and no contrib schema has to be registered in onnx:
nothing global is changed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnc import logs
from attnc.codegen.onnx import missing
from attnc.codegen.onnx.builder import OURS
from attnc.codegen.onnx.names import is_attend
from attnc.codegen.onnx.sites import Call, Size
from attnc.errors import CodegenError
from attnc.printer import parse
from attnc.programs import functional_program, is_functional

if TYPE_CHECKING:
    import onnx_ir as ir

log = logs.get("codegen")

ATTEND, LINEAR = "Attend", "LinearW8A8"

_LONGEST = 200
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TENSORS = [
    f"tensor({t})"
    for t in ("float", "float16", "bfloat16", "double", "bool", "int8", "uint8", "int32", "int64")
]
_NOISY = ("torch.onnx._internal.exporter._registration", "torch.onnx._internal.exporter._core")


def flat(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` without writes in place and with the bodies of ``torch.no_grad`` regions in line.

    So it has the nodes that conversion meets, in their order.  Sites keep their ids.
    """
    if is_functional(program):
        return program
    functional = functional_program(program)
    before, after = _attends(program.graph), _attends(functional.graph)
    if [n.args[4] for n in before] == [n.args[4] for n in after]:
        for old, new in zip(before, after, strict=True):
            new.meta["attnc"] = _meta(old)
    return functional


def _attends(graph: fx.Graph) -> list[fx.Node]:
    """Return the attend nodes that reach an output, in the order of the graph."""
    live = _live(graph)
    return [n for n in graph.nodes if n in live and is_attend(n)]


def find_calls(program: ExportedProgram) -> list[Call]:
    """Return the attend nodes that reach an output, in the order of the graph.

    Raises:
        CodegenError: a site that has dropout.
    """
    return calls_of(program.graph)


def calls_of(graph: fx.Graph) -> list[Call]:
    """Return the attend nodes of a graph that reach an output, in order; raises as ``find_calls``."""
    live = _live(graph)
    return [_call(i, n, live) for i, n in enumerate(_attends(graph))]


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that an output depends on."""
    seen: set[fx.Node] = set()
    todo = [n for n in graph.nodes if n.op == "output"]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return seen


def _call(index: int, node: fx.Node, live: set[fx.Node]) -> Call:
    q, k, v, captured, text, *_ = node.args
    assert isinstance(text, str), "the fifth argument of attnc::attend is a text"
    assert isinstance(captured, Sequence), "the captured tensors of attnc::attend are a list"
    spec, (qs, ks, vs) = parse(text), (_shape(x) for x in (q, k, v))
    site = str(_meta(node).get("match", f"site_{index}"))
    if spec.dropout:
        raise CodegenError(
            f"ONNX export, site {site}: expected a program without dropout, found dropout {spec.dropout}; "
            "export in eval mode"
        )
    last = tuple((1, *_shape(c))[-1] for c in captured)
    used = any(u in live and u.args[1] == 1 for u in node.users)
    return Call(index, site, spec, text, (qs[1], ks[1]), (qs[3], vs[3]), (qs[2], ks[2]), last, used)


def _meta(node: fx.Node) -> dict[str, Any]:
    found = node.meta.get("attnc")
    return found if isinstance(found, dict) else {}


def _shape(node: Any) -> tuple[Size, ...]:
    return tuple(int(n) if isinstance(n, int) else str(n) for n in node.meta["val"].shape)


def _operator(name: str, inputs: int, outputs: int, attributes: Sequence[tuple[str, Any]]) -> Any:
    """Return an operator of our domain with its own, unregistered schema; every tensor has its own type."""
    import onnx
    import onnxscript

    schema = onnx.defs.OpSchema
    names = [f"T{i}" for i in range(inputs + outputs)]
    made = schema(
        name,
        OURS,
        1,
        inputs=[schema.FormalParameter(f"x{i}", names[i]) for i in range(inputs)],
        outputs=[schema.FormalParameter(f"y{i}", names[inputs + i]) for i in range(outputs)],
        type_constraints=[(n, _TENSORS, "") for n in names],
        attributes=[schema.Attribute(a, kind) for a, kind in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(OURS, 1), name, made)


def _translations(calls: Sequence[Call], opset: int) -> dict[Any, Any]:
    """Return how our operators are translated; sites are numbered in the order of the graph."""
    import onnx

    kinds = onnx.defs.OpSchema.AttrType
    met: list[str] = []

    def attend(q: Any, k: Any, v: Any, captured: Any, spec: str) -> Any:
        index = len(met)
        met.append(spec)
        if index >= len(calls) or calls[index].text != spec:
            raise CodegenError(
                f"ONNX export: site {index} of the converted graph is not the program's: {spec}"
            )
        op = _operator(ATTEND, 3 + len(captured), 2, [("site", kinds.INT)])
        return op(q, k, v, *captured, site=index)

    def linear(x: Any, weight: Any, weight_scale: Any, bias: Any = None) -> Any:
        given = [x, weight, weight_scale] + ([] if bias is None else [bias])
        return _operator(LINEAR, len(given), 1, [])(*given)

    table = missing.translations(opset)
    ours = (("attend", attend), ("linear_w8a8", linear))
    for name, translation in ours:
        packet = getattr(torch.ops.attnc, name, None)
        if packet is not None:
            table[packet.default] = translation
    if opset >= 23:
        from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

        # From opset 23 on torch writes Attention with the mask as it is; ONNX Runtime wants it expanded.
        table[torch.ops.aten.scaled_dot_product_attention.default] = aten_scaled_dot_product_attention
    return table


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from talking about packages that are not installed."""
    loggers = [logging.getLogger(n) for n in _NOISY]
    before = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*deprecated", category=FutureWarning)
            yield
    finally:
        for x, level in zip(loggers, before, strict=True):
            x.setLevel(level)


def convert(program: ExportedProgram, calls: Sequence[Call], opset: int) -> ir.Model:
    """Return the ONNX model of ``program`` with opaque nodes for our operators.

    Raises:
        CodegenError: an operator without translation, or what else torch's exporter meets, with its causes.
    """
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                optimize=False,
                custom_translation_table=_translations(calls, opset),
            )
    except torch.onnx.OnnxExporterError as e:
        raise CodegenError(f"ONNX export: the program cannot be converted: {_chain(e)}") from e
    assert converted is not None, "torch.onnx.export returns a program when dynamo is on"
    model = _folded(converted)
    found = sum(n.domain == OURS and n.op_type == ATTEND for n in model.graph)
    if found != len(calls):
        raise CodegenError(
            f"ONNX export: expected {len(calls)} attention sites in the converted graph, found {found}"
        )
    return model


def _folded(converted: torch.onnx.ONNXProgram) -> ir.Model:
    """Return the model with its constants folded, or as it is where the exporter's folding fails."""
    before: ir.Model = converted.model.clone()
    try:
        with _quiet():
            converted.optimize()
    except Exception as e:  # the folding of a library, which a correct file can do without
        log.warning("constants are not folded: %s", _chain(e))
        return before
    model: ir.Model = converted.model
    return model


def _chain(error: BaseException) -> str:
    """Return the first line of each error in the chain of causes, the cause first, cut to be readable."""
    lines: list[str] = []
    at: BaseException | None = error
    while at is not None:
        words = _COLOUR.sub("", str(at)).strip()
        line = f"{type(at).__name__}: {words.splitlines()[0]}" if words else type(at).__name__
        line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
        if line not in lines:
            lines.append(line)
        at = at.__cause__ or at.__context__
    return "; then ".join(reversed(lines))
