"""Ask the installed ONNX Runtime whether it does what the table says: tiny models, one per claim."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnc.codegen.onnx.check import check_site
from attnc.codegen.onnx.linear import pairs_saturate
from attnc.codegen.onnx.runtime import PROVIDER, version
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.table import Row, load
from attnc.printer import parse

_SELF = "q=bhqd[b,4,s,16]:{t} k=bhkd[b,{kv},s,16]:{t} v=bhke[b,{kv},s,16]:{t} group={g} "
_CROSS = "q=bhqd[b,4,s,12]:{t} k=bhkd[b,{kv},n,12]:{t} v=bhke[b,{kv},n,8]:{t} group={g} "
_LEAST = torch.finfo(torch.float32).min

_CLAIMS: tuple[tuple[str, str, str], ...] = (
    ("MultiHeadAttention", "plain", _SELF + "scale(0.25) mask=none softmax"),
    ("MultiHeadAttention", "Sq != Sk, Dqk != Dv", _CROSS + "scale(0.25) mask=none softmax"),
    (
        "MultiHeadAttention",
        "padding, uniform where nothing is seen",
        _SELF + f"scale(0.25) mask=padding(key,m) fill(add,{_LEAST!r}) softmax with m=bk[b,s]:bool",
    ),
    (
        "MultiHeadAttention",
        "padding, NaN where nothing is seen",
        _SELF + "scale(0.25) mask=padding(key,m) fill(replace,-inf) softmax with m=bk[b,s]:bool",
    ),
    (
        "MultiHeadAttention",
        "added bias",
        _SELF + "scale(0.25) bias(p) mask=none softmax with p=bhqk[1,4,s,s]:float32",
    ),
    ("GroupQueryAttention", "causal, grouped", _SELF + "scale(0.25) mask=causal fill(replace,-inf) softmax"),
    (
        "GroupQueryAttention",
        "window, softcap, sink, grouped",
        _SELF + "scale(0.25) softcap(5.0) mask=window(left=2,right=0) fill(replace,-inf) softmax(sink=z) "
        "with z=h[4]:float32",
    ),
    (
        "GroupQueryAttention",
        "not causal, padding and softcap",
        _SELF + "scale(0.25) softcap(5.0) mask=padding(key,m) fill(replace,-inf) softmax with m=bk[b,s]:bool",
    ),
    ("Attention", "Sq != Sk, grouped", _CROSS + "scale(0.25) softcap(5.0) mask=none softmax"),
    (
        "Attention",
        "padding, uniform where nothing is seen",
        _CROSS + f"scale(0.25) mask=padding(key,m) fill(add,{_LEAST!r}) softmax with m=bk[b,n]:bool",
    ),
    (
        "basic operators",
        "window, softcap, sink, padding",
        _SELF + "scale(0.25) softcap(5.0) mask=(window(left=2,right=0) & padding(key,m)) fill(replace,-inf) "
        "softmax(sink=z) with z=h[4]:float32 with m=bk[b,s]:bool",
    ),
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
    out = [RuntimeRow("onnxruntime", PROVIDER, table.name, found, not table.note)]
    for operator, claim, text in _CLAIMS:
        rows: list[Row | None] = [r for r in table.rows if r.operator == operator]
        row = rows[0] if rows else None
        grouped = operator in ("GroupQueryAttention", "Attention")
        words = text.format(t="float32", kv=2 if grouped else 4, g=2 if grouped else 1)
        checked = check_site(Call.of(parse(f"attn {words}")), row, row.opset if row else table.opset)
        result = checked.refused or f"error {checked.error:.1e}, tolerance {checked.tolerance:.1e}"
        name = row.name if row else operator
        out.append(
            RuntimeRow(
                name, claim, "agrees", f"{'agrees' if checked.ok else 'differs'}: {result}", checked.ok
            )
        )
    saturates = pairs_saturate()
    words = "saturates on this CPU: uint8 weights are written" if saturates else "exact"
    out.append(RuntimeRow("ai.onnx.MatMulInteger", "uint8 x int8", "exact", words, not saturates))
    return out
