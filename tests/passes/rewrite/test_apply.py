"""A site in the graph becomes one node, what computed it before is gone.

And what cannot be edited is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnc.ir import Scale
from attnc.passes.detect import Found, detect
from attnc.passes.rewrite.apply import Rewriter, parsed
from tests.corpus import CASES, DISTINCT, make_inputs, scaled
from tests.rewriting import Forward, Traced, exported, rounding, traced

ARGS = make_inputs(CASES["no_scale"])
SELF = make_inputs(CASES["causal_by_tril"])
ATTEND = torch.ops.attnc.attend.default


def names(graph: fx.Graph) -> list[str]:
    return [str(n.target).partition(".")[2] for n in graph.nodes if n.op == "call_function"]


def attend_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is ATTEND]


def editor_of(t: Traced) -> tuple[Rewriter, list[Found]]:
    return Rewriter(t.graph, t.work, t.links, t.moments), t.detect()[0]


def assert_same(t: Traced, f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    expected, found = f(*args), t.run(*args)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride() or not expected.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(args, DISTINCT.d + DISTINCT.t))


def noisy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with dropout and casts, which leave nodes that fx keeps for their effects."""
    w = scaled(q, k).to(torch.float64).softmax(-1)
    w = F.dropout(w, 0.5, False).to(q.dtype)
    return F.dropout(w @ v, 0.0, False)


def test_the_old_attention_is_gone_with_dropout_and_asserts_between():
    t = exported(Forward(noisy), ARGS)
    assert "_assert_tensor_metadata.default" in " ".join(names(t.graph))
    t.rewrite(t.detect()[0])
    left = " ".join(names(t.graph))
    assert len(attend_nodes(t.graph)) == 1
    assert not any(op in left for op in ("softmax", "matmul", "transpose", "div", "_assert_tensor_metadata"))
    assert_same(t, noisy, ARGS)


def test_weights_that_are_read_elsewhere_stay_beside_the_rewritten_site():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = scaled(q, k).softmax(-1)
        return w @ v + w.sum()

    t = traced(attention, ARGS)
    editor, found = editor_of(t)
    assert found[0].match.escapes == ("softmax",)
    editor.apply(found[0])
    t.graph.owning_module.recompile()
    left = [str(n.target) for n in t.graph.nodes if n.op == "call_function"]
    assert left.count("aten.softmax.int") == 1
    assert left.count("aten.matmul.default") == 1, "the contraction with the values is gone, the scores stay"
    torch.testing.assert_close(t.run(*ARGS), attention(*ARGS))


def test_weights_written_to_memory_that_nobody_reads_go_with_the_attention():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = scaled(q, k).softmax(-1)
        kept = torch.zeros_like(w)
        kept[:, :1] = w[:, :1]
        return w @ v * 1

    t = exported(Forward(attention), ARGS)
    t.rewrite(t.detect()[0])
    assert not any("softmax" in n.name or "copy_" in n.name for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*ARGS), attention(*ARGS))


def test_keys_put_together_by_writes_are_read_after_the_last_one():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = k.new_empty(k.shape)
        key[..., :4] = k[..., :4]
        key[..., 4:] = k[..., 4:].tanh()
        return scaled(q, key).softmax(-1) @ v * 1

    t = exported(Forward(attention), ARGS)
    t.rewrite(t.detect()[0])
    assert not any("softmax" in n.name for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*ARGS), attention(*ARGS))


def test_a_result_that_is_written_to_later_is_still_replaced():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled(q, k).softmax(-1) @ v
        out.unsqueeze_(1)
        out.mul_(q.mean())
        return out * 1

    t = exported(Forward(attention), ARGS)
    t.rewrite(t.detect()[0])
    assert not any("softmax" in n.name for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*ARGS), attention(*ARGS))


def test_edits_in_place_go_with_the_attention():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.transpose(-2, -1)
        w.mul_(0.5)
        w += 0.25
        w.view(-1).sub_(0.125)
        return w.softmax(-1) @ v

    t = exported(Forward(lambda q, k, v: attention(q, k, v) * 1), ARGS)
    t.rewrite(t.detect()[0])
    assert len(attend_nodes(t.graph)) == 1
    assert not any(op in " ".join(names(t.graph)) for op in ("mul_", "add_", "sub_", "matmul", "softmax"))
    assert_same(t, attention, ARGS)


def test_writes_that_others_read_stay():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.zeros_like(q)
        seen = bias.add_(1.0)
        return scaled(q, k).softmax(-1) @ v + bias.sum() + seen.sum()

    t = exported(Forward(attention), ARGS)
    t.rewrite(t.detect()[0])
    assert "aten.add_.Tensor" in {str(n.target) for n in t.graph.nodes}
    assert_same(t, attention, ARGS)


def test_a_view_of_the_result_still_finds_it_contiguous():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        out = torch.einsum("bhij,bhjd->bihd", w, v).contiguous()
        return torch.ops.aten.view.default(out, [out.shape[0], out.shape[1], -1])

    assert_rewritten(attention, ARGS)

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = (k @ q.transpose(-2, -1)).softmax(-2)
        out = v.transpose(-2, -1).contiguous() @ w
        return torch.ops.aten.view.default(out, [out.shape[0], -1])

    assert_rewritten(written, ARGS)


def assert_rewritten(f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Traced:
    t = traced(f, args)
    t.rewrite(t.detect()[0])
    assert len(attend_nodes(t.graph)) == 1
    assert_same(t, f, args)
    return t


def test_sites_that_overlap_in_time_share_their_masks():
    """The first softmax belongs to the last output.

    What the one site makes must not be too late for the other.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        hide = (valid == 0)[:, None, None]
        first = scaled(q, k).masked_fill(hide, -1e9).softmax(-1)
        second = scaled(k, q).masked_fill(hide, -1e9).softmax(-1)
        early = second @ v
        late = first @ v
        return torch.cat([late, early])

    args = make_inputs(CASES["causal_and_padding"])
    t = traced(attention, args)
    found, _ = t.detect()
    assert len(found) == 2
    t.rewrite(found)
    assert_same(t, attention, args)


def test_sizes_computed_for_one_site_serve_the_next():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(2):
            b, s = q.shape[0], q.shape[1]
            x, y, z = (t.view(b, s, 3, 4).transpose(1, 2) for t in (q, k, v))
            keep = torch.ones(s, s, dtype=torch.bool).tril()
            w = scaled(x, y).masked_fill(~keep, float("-inf")).softmax(-1)
            q = (w @ z).transpose(1, 2).reshape(b, s, 12)
        return q

    args = tuple(torch.randn(2, 5, 12, dtype=torch.float64) for _ in range(3))
    t = exported(Forward(attention), args, dynamic=True)
    t.rewrite(t.detect()[0])
    assert len(attend_nodes(t.graph)) == 2
    for n in (5, 8):
        inputs = tuple(torch.randn(3, n, 12, dtype=torch.float64) for _ in range(3))
        assert_same(t, attention, inputs)


def test_nodes_say_who_made_them():
    t = exported(Forward(noisy), ARGS)
    editor, found = editor_of(t)
    made = editor.apply(found[0], stamp={"match": "model", "form": "fused"})
    node = attend_nodes(t.graph)[0]
    assert node.meta["attnc"] == {"match": "model", "form": "fused"}
    assert parsed(node) == found[0].match.spec
    assert made in {n.name for n in t.graph.nodes}
    assert "rewriting.py" in node.meta["stack_trace"]


def test_another_spec_may_take_the_place_of_the_found_one():
    t = traced(CASES["no_scale"].f, ARGS)
    editor, found = editor_of(t)
    editor.apply(found[0], replace(found[0].match.spec, scores=(Scale(0.5),)))
    t.graph.owning_module.recompile()
    q, k, v = ARGS
    assert_same(t, lambda q, k, v: (q @ k.mT * 0.5).softmax(-1) @ v, (q, k, v))


# ---------------------------------------------------------------- what is not edited


def blocked_code(t: Traced, at: int = 0) -> str:
    editor = Rewriter(t.graph, t.work, t.links, t.moments)
    miss = editor.blocked(detect(t.work, t.tensors)[0][at])
    assert miss is not None
    assert miss.why
    return miss.code


def test_a_value_without_a_counterpart_is_no_link():
    t = traced(CASES["no_scale"].f, ARGS)
    assert blocked_code(replace(t, moments={})) == "no-link"
    found, _ = t.detect()
    missing = {k: v for k, v in t.links.items() if k != found[0].operands["k"].source}
    assert blocked_code(replace(t, links=missing)) == "no-link"


def test_a_change_of_grad_mode_inside_is_not_crossed():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = scaled(q, k)
        torch._C._set_grad_enabled(False)
        return w.softmax(-1) @ v

    t = traced(CASES["no_scale"].f, ARGS)
    softmax = next(n for n in t.graph.nodes if "softmax" in n.name)
    with t.graph.inserting_before(softmax):
        t.graph.call_function(torch._C._set_grad_enabled, (False,))
    assert blocked_code(t) == "crosses-switch"


def test_an_operand_made_too_late_is_refused():
    t = traced(CASES["no_scale"].f, ARGS)
    found, _ = t.detect()
    later = dict(t.links)
    later[found[0].operands["q"].source] = next(n.name for n in t.graph.nodes if n.op == "output")
    editor = Rewriter(t.graph, t.work, later)
    miss = editor.blocked(found[0])
    assert miss is not None
    assert miss.code == "operand-after-output"


def test_leaves_are_what_operands_are_made_from():
    case = CASES["causal_and_padding"]
    t = traced(case.f, make_inputs(case))
    found, _ = t.detect()
    (captured,) = found[0].captured.values()
    inputs = [n.name for n in t.graph.nodes if n.op == "placeholder"]
    assert captured.reads == (inputs[3],)
    assert [found[0].operands[n].reads for n in "qkv"] == [(n,) for n in inputs[:3]]


def test_an_attention_whose_query_is_another_attention():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled(scaled(q, k).softmax(-1) @ k, k).softmax(-1) @ v

    t = traced(attention, SELF)
    editor, found = editor_of(t)
    for site in found:
        editor.apply(site)
    t.graph.owning_module.recompile()
    assert len(attend_nodes(t.graph)) == 2
    assert_same(t, attention, SELF)


def test_a_bias_shaped_like_the_scores_does_not_keep_them_alive():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.transpose(-2, -1)
        bias = q.sum(-1, keepdim=True).expand_as(w).flatten().reshape_as(w).type_as(w)
        return (w + bias * 0.1).softmax(-1) @ v * 1

    program = torch.export.export(Forward(attention), ARGS, strict=False)
    names = {n.name: n.name for n in program.graph.nodes}
    t = Traced(program.graph, program.graph, names, {}, lambda *a: program.graph_module(*a)[0])
    t.rewrite(t.detect()[0])
    left = [str(n.target) for n in t.graph.nodes if n.op == "call_function"]
    assert not any("matmul" in name for name in left)
    torch.testing.assert_close(t.run(*ARGS), attention(*ARGS))
