"""Windows over overlapping views against the dense masked softmax in float64."""

import itertools
import random

import pytest
import torch

from attnc.codegen.sdpa import window as module
from attnc.codegen.sdpa.window import window_attention
from attnc.errors import UnsupportedError

LENGTHS = [1, 7, 63, 64, 65, 129, 300, 1000]
REACHES = [1, 4, 64, 100, 2000]
U = 2.0**-24


@pytest.fixture(params=["blocks", "chosen"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with blocks wherever there is one, and with whatever the module would choose."""
    if request.param == "blocks":
        monkeypatch.setattr(module, "_OVERHEAD", -float("inf"))


def keep_of(sq, sk, left, right, sinks, causal, offset=0) -> torch.Tensor:
    """The definition, pair by pair."""
    p, k = torch.arange(sq)[:, None] + offset, torch.arange(sk)[None, :]
    ok = ((p - k >= -right) & (p - k <= left)) | (k < sinks)
    return ok & (k <= p) if causal else ok


def dense(q, k, v, keep, scale=None, empty="zero") -> torch.Tensor:
    """The oracle, in the dtype of its operands; ``keep`` broadcasts to [B, H, Sq, Sk]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    none = ~keep.any(-1, keepdim=True)
    weights = scores.masked_fill(~keep, -torch.inf).masked_fill(none, 0.0).softmax(-1)
    return (weights @ v).masked_fill(none, 0.0 if empty == "zero" else torch.nan)


def operands(b, h, hk, sq, sk, d, dv, seed=0, dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv))]


def close(got, q, k, v, keep, scale=None, empty="zero") -> None:
    """Compare with float64: a convex sum of values, whose weights err as the scores do."""
    want = dense(q.double(), k.double(), v.double(), keep, scale, empty)
    assert torch.equal(got.isnan(), want.isnan())
    u = torch.finfo(q.dtype).eps
    size = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    score_error = 8 * u * size * q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() + 4 * u
    assert (
        (got.double() - want).nan_to_num().abs() <= (2 * score_error + 2 * u) * v.double().abs().max()
    ).all()


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_dense_softmax(n: int, causal: bool) -> None:
    for reach, sinks in itertools.product(REACHES, (0, 1, 4)):
        q, k, v = operands(1, 2, 1, n, n, 16, 16, seed=reach + sinks)
        right = 0 if causal else reach
        got = window_attention(q, k, v, left=reach - 1, right=right, sinks=sinks, causal=causal, scale=None)
        close(got, q, k, v, keep_of(n, n, reach - 1, right, sinks, causal))


@pytest.mark.usefixtures("_path")
def test_random_settings() -> None:
    rng = random.Random(0)
    for trial in range(200):
        b, hk, g, d, dv = (rng.choice(c) for c in ([1, 2, 3], [1, 2, 3], [1, 2], [4, 8], [4, 8]))
        sq = rng.choice([1, 7, 64, 129, 300])
        sk = rng.choice([sq, 1, 50, 200, 310])
        how = {
            "left": rng.choice([0, 3, 63, 100, 1000]),
            "right": rng.choice([0, 1, 5, 64]),
            "sinks": rng.choice([0, 0, 1, 4, 70]),
            "causal": rng.random() < 0.5,
            "offset": rng.choice([0, sk - sq, -3, 10]),
        }
        empty = rng.choice(["zero", "nan"])
        q, k, v = operands(b, hk * g, hk, sq, sk, d, dv, seed=trial)
        if rng.random() < 0.5:  # the layout of a projection: heads inside the row
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        rows = torch.rand(b, sk) < rng.choice([0.05, 0.5, 0.9]) if rng.random() < 0.5 else None
        keep = keep_of(sq, sk, **how).expand(b, 1, sq, sk)
        if rows is not None:
            keep = keep & rows[:, None, None]
        got = window_attention(q, k, v, **how, scale=0.3, key_keep=rows, empty=empty)
        close(got, q, k, v, keep, 0.3, empty)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = operands(2, 4, 2, 300, 300, 32, 32, dtype=dtype)
    got = window_attention(q, k, v, left=63, right=0, sinks=4, causal=True, scale=None)
    assert got.dtype == dtype
    close(got, q, k, v, keep_of(300, 300, 63, 0, 4, True))


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("b", "h", "hk"), [(1, 2, 2), (2, 4, 2), (3, 2, 2)])
def test_gradients_equal_those_of_dense_softmax(
    monkeypatch, b: int, h: int, hk: int, padded: bool, sinks: int
) -> None:
    monkeypatch.setattr(module, "_OVERHEAD", -float("inf"))
    torch.manual_seed(0)
    n, left = 200, 40
    exact = [t.requires_grad_() for t in operands(b, h, hk, n, n, 8, 8, dtype=torch.float64)]
    dy = torch.randn(b, h, n, 8, dtype=torch.float64)
    rows = None
    keep = keep_of(n, n, left, 3, sinks, False).expand(b, 1, n, n)
    if padded:
        rows = torch.rand(b, n) < 0.8
        rows[:, :60] = False  # left padding: whole rows see nothing when there are no sinks
        keep = keep & rows[:, None, None]
    want = torch.autograd.grad(dense(*exact, keep), exact, dy)

    def error(dtype: torch.dtype, run) -> float:
        leaves = [t.detach().to(dtype).requires_grad_() for t in exact]
        got = torch.autograd.grad(run(*leaves), leaves, dy.to(dtype))
        return max(
            (a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(got, want, strict=True)
        )

    def run(q, k, v) -> torch.Tensor:
        return window_attention(
            q, k, v, left=left, right=3, sinks=sinks, causal=False, scale=None, key_keep=rows
        )

    assert error(torch.float64, run) <= 1e-13  # 2**-53 times a few hundred additions
    assert error(torch.float32, run) <= 3 * error(torch.float32, lambda q, k, v: dense(q, k, v, keep)) + U


@pytest.mark.parametrize("empty", ["zero", "nan"])
def test_a_row_that_sees_nothing_has_no_gradient(monkeypatch, empty: str) -> None:
    monkeypatch.setattr(module, "_OVERHEAD", -float("inf"))
    q, k, v = (t.requires_grad_() for t in operands(1, 1, 1, 200, 200, 8, 8))
    rows = torch.ones(1, 200, dtype=torch.bool)
    rows[:, 50:150] = False
    out = window_attention(q, k, v, left=9, right=0, causal=True, scale=None, key_keep=rows, empty=empty)
    blind = keep_of(200, 200, 9, 0, 0, True)[:, rows[0]].any(-1).logical_not()
    assert blind.sum() == 91
    row = out[0, 0, blind]
    assert row.isnan().all() if empty == "nan" else (row == 0).all()
    grads = torch.autograd.grad(out.nan_to_num().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, 0, blind] == 0).all()
    assert (grads[2][0, 0, 50:150] == 0).all()


def test_no_row_of_a_mask_is_all_minus_infinity() -> None:
    keep = torch.tensor([[True, False], [False, False]])
    mask, hidden = module._float_mask(keep, torch.float32, True)
    assert mask.tolist() == [[0.0, -float("inf")], [0.0, 0.0]]
    assert hidden.tolist() == [[False], [True]]


def test_blocks_view_keys_without_copying_them() -> None:
    k = torch.randn(2, 3, 500, 8)
    view = module._blocks(k, 10, 4, 64, 127, 0)
    assert view.shape == (2, 3, 4, 127, 8)
    assert view.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert torch.equal(view[1, 2, 3], k[1, 2, 10 + 3 * 64 : 10 + 3 * 64 + 127])


def test_no_operator_makes_a_tensor_of_all_pairs_or_of_repeated_keys() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                # what is stored, not what is shown: a view is as large as its storage
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
            return out

    n = 4096
    for h, hk, sinks in ((2, 2, 0), (4, 2, 0), (2, 2, 4)):
        q, k, v = operands(1, h, hk, n, n, 32, 32)
        with Largest() as seen, torch.no_grad():
            window_attention(q, k, v, left=255, right=0, sinks=sinks, causal=True, scale=None)
        assert seen.size <= 1.1 * max(q.numel(), k.numel() * (1 + sinks / 64))


def test_short_sequences_take_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        module.F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(k), real(*a, **k))[1]
    )
    q, k, v = operands(1, 8, 8, 128, 128, 32, 32)
    window_attention(q, k, v, left=63, right=0, causal=True, scale=None)
    assert len(calls) == 1
    window_attention(q, k, v, left=500, right=0, causal=True, scale=None)
    assert calls[-1]["is_causal"]
    q, k, v = operands(1, 8, 8, 2048, 2048, 32, 32)
    del calls[:]
    window_attention(q, k, v, left=63, right=0, causal=True, scale=None)
    assert len(calls) == 3  # the blocks, what is before the first window, what is left over


@pytest.mark.parametrize("sinks", [0, 4])
def test_export_at_a_static_length_and_a_dynamic_batch(sinks: int) -> None:
    class Windowed(torch.nn.Module):
        def forward(self, q, k, v, rows):
            return window_attention(
                q, k, v, left=63, right=0, sinks=sinks, causal=True, scale=None, key_keep=rows
            )

    n = 700
    q, k, v = operands(2, 4, 2, n, n, 16, 16)
    rows = torch.rand(2, n) < 0.9
    batch = torch.export.Dim("batch", min=2, max=16)
    each = {0: batch}
    program = torch.export.export(Windowed(), (q, k, v, rows), dynamic_shapes=(each,) * 4, strict=False)
    q, k, v = operands(3, 4, 2, n, n, 16, 16, seed=5)
    rows = torch.rand(3, n) < 0.9
    keep = keep_of(n, n, 63, 0, sinks, True) & rows[:, None, None]
    close(program.module()(q, k, v, rows), q, k, v, keep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 4, 8)}, "Hk dividing H"),
        ({"k": torch.zeros(1, 2, 4, 6)}, "expected q"),
        ({"q": torch.zeros(2, 4, 8)}, "expected q"),
        ({"left": -1}, "left=-1"),
        ({"sinks": -2}, "sinks=-2"),
        ({"key_keep": torch.zeros(1, 4)}, "key_keep bool"),
        ({"key_keep": torch.zeros(1, 5, dtype=torch.bool)}, "key_keep bool"),
        ({"empty": "uniform"}, "found 'uniform'"),
    ],
)
def test_wrong_operands_are_named(change: dict, message: str) -> None:
    how = {"q": torch.zeros(1, 2, 4, 8), "k": torch.zeros(1, 2, 4, 8), "v": torch.zeros(1, 2, 4, 8)}
    how |= {"left": 1, "right": 0, "causal": True, "scale": None, **change}
    with pytest.raises(UnsupportedError, match=message):
        window_attention(how.pop("q"), how.pop("k"), how.pop("v"), **how)
