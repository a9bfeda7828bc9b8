"""Ask the installed ONNX Runtime whether it does what its table says: tiny models, one per claim.

Every row of the table is tried with each element type it has, with everything that it takes, and with what
bites: rows that see no key, biases of -inf, unequal lengths and head sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attnc.codegen.onnx.check import check_site, site_model
from attnc.codegen.onnx.linear import pairs_saturate
from attnc.codegen.onnx.runtime import Session, failures, version
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.table import FAMILIES, Row, Table, load
from attnc.printer import parse

_SELF = "q=bhqd[b,4,s,16]:{t} k=bhkd[b,{kv},s,16]:{t} v=bhke[b,{kv},s,16]:{t} group={g} "
_CROSS = "q=bhqd[b,4,s,12]:{t} k=bhkd[b,{kv},n,12]:{t} v=bhke[b,{kv},n,8]:{t} group={g} "
_LEAST = torch.finfo(torch.float32).min
_HIDING = "fill(replace,-inf) softmax"

CLAIMS: tuple[tuple[str, str], ...] = (
    ("plain", _SELF + "scale(0.25) mask=none softmax"),
    ("Sq != Sk, Dqk != Dv", _CROSS + "scale(0.25) mask=none softmax"),
    ("causal", _SELF + f"scale(0.25) mask=causal {_HIDING}"),
    ("causal, Sq != Sk", _CROSS + f"scale(0.25) mask=causal {_HIDING}"),
    ("window", _SELF + f"scale(0.25) mask=window(left=2,right=0) {_HIDING}"),
    ("softcap", _SELF + "scale(0.25) softcap(0.5) mask=none softmax"),
    ("softcap, causal", _SELF + f"scale(0.25) softcap(0.5) mask=causal {_HIDING}"),
    (
        "sink, causal",
        _SELF + "scale(0.25) mask=causal fill(replace,-inf) softmax(sink=z) with z=h[4]:{t}",
    ),
    (
        "window, softcap, sink",
        _SELF + "scale(0.25) softcap(0.5) mask=window(left=2,right=0) fill(replace,-inf) softmax(sink=z) "
        "with z=h[4]:{t}",
    ),
    ("bias with rows of -inf", _SELF + "scale(0.25) bias(p) mask=none softmax with p=bhqk[1,4,s,s]:{t}"),
    (
        "padding, uniform where nothing is seen",
        _SELF + f"scale(0.25) mask=padding(key,m) fill(add,{_LEAST!r}) softmax with m=bk[b,s]:bool",
    ),
    (
        "padding, NaN where nothing is seen",
        _SELF + f"scale(0.25) mask=padding(key,m) {_HIDING} with m=bk[b,s]:bool",
    ),
    (
        "padding and softcap, not causal",
        _SELF + f"scale(0.25) softcap(0.5) mask=padding(key,m) {_HIDING} with m=bk[b,s]:bool",
    ),
    (
        "causal and padding, NaN where nothing is seen",
        _SELF + f"scale(0.25) mask=(causal & padding(key,m)) {_HIDING} with m=bk[b,s]:bool",
    ),
)
"""What may be claimed, as a spec; a row claims those that it does not refuse."""

_BASIC = (
    _SELF + "scale(0.25) softcap(5.0) mask=(window(left=2,right=0) & padding(key,m)) fill(replace,-inf) "
    "softmax(sink=z) with z=h[4]:{t} with m=bk[b,s]:bool"
)


@dataclass(frozen=True, slots=True)
class RuntimeRow:
    """One claim about the installed runtime: what the table expects and what was found."""

    operator: str
    claim: str
    expected: str
    found: str
    ok: bool


def check_runtime() -> list[RuntimeRow]:
    """Run a tiny model for every claim of the table nearest to the installed ONNX Runtime.

    The first row is the runtime itself.  A claim that fails is no error: exports fall back where a site
    disagrees.

    Raises:
        CodegenError: no ONNX Runtime is installed.
    """
    found = version()
    table = load("ort-cpu", found)
    out = [RuntimeRow("onnxruntime", table.provider, table.name, found, not table.note)]
    for row in table.rows:
        out += [_tried(row, f"{claim}, {dtype}", call, table) for claim, dtype, call in claims(row)]
    call = Call.of(parse("attn " + _BASIC.format(t="float32", kv=2, g=2)))
    out.append(_tried(None, "window, softcap, sink, padding", call, table))
    out += [_unmeasured(load(family)) for family in FAMILIES if not load(family).measured]
    out += [_opset(call, table.greatest_opset, True), _opset(call, table.greatest_opset + 1, False)]
    saturates = pairs_saturate()
    words = "saturates on this CPU: uint8 weights are written" if saturates else "exact"
    out.append(RuntimeRow("ai.onnx.MatMulInteger", "uint8 x int8", "exact", words, not saturates))
    return out


def claims(row: Row) -> Iterator[tuple[str, str, Call]]:
    """Give what a row claims: the words, the element type, and a site that the row does not refuse."""
    grouped = "equal-heads" not in row.conditions
    for dtype in row.dtypes:
        for claim, text in CLAIMS:
            words = text.format(t=dtype, kv=2 if grouped else 4, g=2 if grouped else 1)
            call = Call.of(parse(f"attn {words}"))
            if row.refuses(call) is None:
                yield claim, dtype, call


def _tried(row: Row | None, claim: str, call: Call, table: Table) -> RuntimeRow:
    checked = check_site(call, row, row.opset if row else table.opset)
    result = checked.refused or f"error {checked.error:.1e}, tolerance {checked.tolerance:.1e}"
    name = row.name if row else "basic operators"
    return RuntimeRow(name, claim, "agrees", f"{'agrees' if checked.ok else 'differs'}: {result}", checked.ok)


def _unmeasured(table: Table) -> RuntimeRow:
    """Say that a table holds what its runtime publishes, which nobody has run."""
    words = "not measured: what the runtime publishes"
    return RuntimeRow(table.provider, table.name, words, words, True)


def _opset(call: Call, opset: int, runs: bool) -> RuntimeRow:
    """Ask whether models of an opset are loaded, as the table says."""
    try:
        Session(site_model(call, None, opset))
        found = "runs"
    except failures():
        found = "refused"
    expected = "runs" if runs else "refused"
    return RuntimeRow("ONNX Runtime", f"opset {opset}", expected, found, found == expected)
