"""What the backward knows of rows of weights over their own sum."""

from __future__ import annotations

import pytest

from attnc.codegen.triton import emit
from attnc.codegen.triton.aot import report_rows
from attnc.codegen.triton.shares import never_negative
from attnc.ir import Pointwise
from attnc.printer import parse

TEXT = (
    "attn q=bhqd[b,h,s,16]:float32 k=bhkd[b,hkv,t,16]:float32 v=bhke[b,hkv,t,16]:float32 group=1"
    " mask={} fill(replace,-inf) normalized({})"
)


@pytest.mark.parametrize(
    ("text", "never"),
    [
        ("relu(s)", True),
        ("(square(s)/2.0)", True),
        ("(exp((s-3.0))*sigmoid(s))", True),
        ("(abs(s)+0.5)", True),
        ("(s*s)", True),
        ("pow(s,4.0)", True),
        ("pow(s,3.0)", False),
        ("pow(abs(s),3.0)", True),
        ("maximum(s,0.0)", True),
        ("minimum(relu(s),1.0)", True),
        ("minimum(s,1.0)", False),
        ("where((s==-inf),0.0,exp(s))", True),
        ("where((s==-inf),0.0,s)", False),
        ("(abs(s)-0.5)", False),
        ("(relu(s)*-1.0)", False),
        ("(relu(s)/s)", False),
        ("((1.0+s)+(square(s)/2.0))", False),  # it has none, but no part of it says so
        ("tanh(s)", False),
    ],
)
def test_a_function_is_known_to_be_never_negative_by_its_parts(text: str, never: bool) -> None:
    assert never_negative(Pointwise(text).term) is never


@pytest.mark.parametrize(
    ("weights", "again", "settled", "spread"),
    [
        ("relu(s)", False, False, True),
        ("relu(s),added=0.5", False, False, False),
        ("relu(s),added=-0.5", True, False, True),
        ("relu(s),least=0.5", False, True, False),
        ("relu(s),least=-0.5", False, False, True),
        ("relu(s),added=-1.0,least=-0.5", True, True, True),
        ("where((s==-inf),0.0,tanh(s))", True, False, True),
        ("where((s==-inf),0.0,tanh(s)),least=0.0", False, True, True),
        ("where((s==-inf),0.0,tanh(s)),least=0.5", False, True, False),
        ("where((s==-inf),0.0,tanh(s)),least=-0.5", True, True, True),
    ],
)
def test_a_file_has_what_its_sums_may_come_to(weights: str, again: bool, settled: bool, spread: bool) -> None:
    source = emit(parse(TEXT.format("causal", weights)), name="site", kind="backward").source
    assert ("low = lse != lse" in source) is again
    assert ("held = " in source) is settled
    assert ("dlse_ptr" in source) is settled
    assert ("delta -= dlse\n" in source) is not settled
    assert ("tl.max(largest, 0)" in source) is spread


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_where_every_key_is_visited_there_is_none_to_come_back_to(mask: str) -> None:
    fill = " fill(replace,-inf)" if mask == "none" else "-inf"
    text = TEXT.format(mask, "exp(s)").replace(fill, "" if mask == "none" else "0.0")
    assert "tl.max(largest, 0)" not in emit(parse(text), name="site", kind="backward").source


WIDE = (
    "attn q=bhqd[b,h,s,{d}]:bfloat16 k=bhkd[b,hkv,t,{d}]:bfloat16 v=bhke[b,hkv,t,{d}]:bfloat16 group=4"
    " scale(0.125) {rest}"
)
SITES = {
    "causal": "mask=causal fill(replace,-inf) {norm}",
    "padded": "mask=(causal & padding(key,pad)) fill(replace,-inf) {norm} with pad=bk[b,t]:bool",
    "biased": "bias(rel) mask=none {norm} with rel=bhqk[1,h,s,t]:bfloat16",
}
NORMS = {
    "taylor": "normalized(where((s==-inf),0.0,((1.0+s)+(square(s)/2.0))))",
    "bounded": "normalized(relu(s),added=1e-06,least=0.001)",
    "fourth_power": "normalized(square(square(s)))",
}


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kind", ["backward", "varlen_backward"])
def test_the_default_tiles_compile_without_spills(kind: str, d: int, site: str, norm: str) -> None:
    spec = parse(WIDE.format(d=d, rest=SITES[site].format(norm=NORMS[norm])))
    for row in report_rows(emit(spec, name="site", kind=kind)):
        assert row["error"] is None, row
        assert not row["over_limit"], row
        assert (row["stack"], row["spills"]) == (0, 0), row
