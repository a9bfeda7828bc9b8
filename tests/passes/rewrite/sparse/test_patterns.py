"""Forms over positions keep what their definitions say, pair by pair, at every small size."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attnc.errors import RewriteError
from attnc.ir import AttentionSpec, Operand, Scale, Softmax
from attnc.masks import CAUSAL, Full, Grid, Mask, Padding
from attnc.passes.rewrite.forms import parse_forms
from attnc.passes.rewrite.sparse.chunked import Chunked
from attnc.passes.rewrite.sparse.neighborhood import Neighborhood
from attnc.passes.rewrite.sparse.power import PowerAttention
from attnc.passes.rewrite.sparse.s2 import S2
from attnc.passes.rewrite.sparse.view_time import ViewTime
from attnc.printer import parse


def spec(
    mask: Mask, tokens: int | str, heads: int | str = 2, group: int = 1, keys: int | str | None = None
) -> AttentionSpec:
    keys = tokens if keys is None else keys
    kv_heads = heads // group if isinstance(heads, int) else "hkv"
    return AttentionSpec(
        Operand("q", "bhqd", (1, heads, tokens, 4), torch.float64),
        Operand("k", "bhkd", (1, kv_heads, keys, 4), torch.float64),
        Operand("v", "bhke", (1, kv_heads, keys, 4), torch.float64),
        group,
        (Scale(0.5),),
        mask,
    )


def kept(mask: Mask, tokens: int, heads: int = 1) -> Tensor:
    grid = Grid(tokens, tokens, torch.device("cpu"), {}, h=heads)
    return mask.keep(grid).expand(1, heads, tokens, tokens)[0]


# ---------------------------------------------------------------- neighborhoods


def axis_sees(q: int, k: int, length: int, w: int, s: int, d: int, causal: bool) -> bool:
    """The definition of the Generalized Neighborhood Attention paper, one axis, in plain numbers."""
    if q % d != k % d:
        return False
    group = len(range(q % d, length, d))
    u, c = q // d, k // d
    if causal:
        leader = min(u // s * s + s - 1, group - 1)
        return max(leader - (w - 1), 0) <= c <= u
    leader = min(u // s * s + s // 2, group - 1)
    start = min(max(leader - w // 2, 0), group - w)
    return start <= c < start + w


def shapes(length: int) -> list[tuple[int, int, int]]:
    return [
        (w, s, d)
        for d in range(1, 5)
        for w in range(1, length // d + 1)
        for s in {1, 2, w - 1, w} & {*range(1, w + 1)}
    ]


@pytest.mark.parametrize("length", range(1, 25))
@pytest.mark.parametrize("causal", [False, True])
def test_neighborhoods_on_a_line(length: int, causal: bool) -> None:
    some = shapes(length)
    for w, s, d in some if length <= 12 else some[:: length // 4]:
        form = Neighborhood(length, w, s, d, causal)
        want = [[axis_sees(q, k, length, w, s, d, causal) for k in range(length)] for q in range(length)]
        assert torch.equal(kept(form.mask(spec(Full(), length)), length)[0], torch.tensor(want)), (w, s, d)


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 7), (2, 3, 4)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_neighborhoods_on_a_grid_are_the_product_of_their_axes(grid: tuple[int, ...], prefix: int) -> None:
    window, stride = tuple(max(n // 2, 1) for n in grid), (1,) * (len(grid) - 1) + (grid[-1] // 2 or 1,)
    causal = (True,) + (False,) * (len(grid) - 1)
    form = Neighborhood(grid, window, stride, 1, causal, prefix=prefix)
    places = list(itertools.product(*map(range, grid)))
    near = [
        [
            all(axis_sees(*x, 1, c) for *x, c in zip(q, k, grid, window, stride, causal, strict=True))
            for k in places
        ]
        for q in places
    ]
    want = torch.ones(len(places) + prefix, len(places) + prefix, dtype=torch.bool)
    want[prefix:, prefix:] = torch.tensor(near)
    assert torch.equal(kept(form.mask(spec(Full(), len(want))), len(want))[0], want)


@pytest.mark.parametrize(("window", "stride", "dilation"), [(5, 1, 1), (4, 2, 1), (7, 7, 1), (3, 1, 4)])
def test_a_window_keeps_its_size_at_the_border(window: int, stride: int, dilation: int) -> None:
    mask = kept(Neighborhood(21, window, stride, dilation).mask(spec(Full(), 21)), 21)[0]
    assert set(mask.sum(-1).tolist()) == {window}
    assert mask.diagonal().all()


def test_a_window_that_fills_the_grid_is_dense() -> None:
    assert Neighborhood((4, 6), (4, 6)).mask(spec(CAUSAL, 24)) == CAUSAL


def test_a_stride_of_the_window_is_attention_within_blocks() -> None:
    blocks = kept(Chunked(4).mask(spec(Full(), 20)), 20)
    assert torch.equal(kept(Neighborhood(20, 4, 4).mask(spec(Full(), 20)), 20), blocks)


def test_a_grid_of_other_tokens_is_a_reason() -> None:
    miss = Neighborhood((4, 4), (2, 2), prefix=1).applies(spec(Full(), 16))
    assert miss.code == "pattern-tokens"
    assert "a prefix of 1 are 17 tokens, the site has 16" in miss.why


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"grid": (4, 4), "window": (5, 4)},
            "at most the axis of 4 tokens, found 5 \\* 1",
        ),
        ({"grid": 9, "window": 4, "dilation": 3}, "axis of 9 tokens, found 4 \\* 3"),
        ({"grid": 9, "window": 2, "stride": 3}, "stride of at most the window of 2, found 3"),
        ({"grid": (2, 2, 2, 2), "window": 1}, "one to three axes"),
        ({"grid": (4, 4), "window": (2, 2, 2)}, "window as one value or one for each of 2 axes"),
        ({"grid": 4, "window": 0}, "window as a whole number of steps >= 1, found 0"),
        ({"grid": 4, "window": 2, "causal": 1}, "causal as True or False, found 1"),
        ({"grid": 4, "window": 2, "prefix": -1}, "prefix as a whole number"),
    ],
)
def test_neighborhoods_that_make_no_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        Neighborhood(**options)


# ---------------------------------------------------------------- S2 and chunks


@pytest.mark.parametrize(
    ("heads", "group", "options"),
    [
        (4, 1, {"vertical": 4}),
        (8, 2, {"vertical": 4, "local": 1, "offset": 3}),
        (2, 1, {"vertical": 8, "dense_heads": 1}),
        (2, 1, {"vertical": 2, "local": 3}),
    ],
)
def test_shards_of_a_causal_site(heads: int, group: int, options: dict) -> None:
    form = S2(block=3, **{"local": 2, **options})
    n, v, kv_heads = 40, form.vertical, heads // group
    site = spec(CAUSAL, n, heads, group)
    assert form.applies(site) is None
    want = torch.zeros(heads, n, n, dtype=torch.bool)
    for h, q in itertools.product(range(heads), range(n)):
        g = h // group
        for k in range(q + 1):
            i, j = q // 3, k // 3
            far = (j + g * max(1, v // heads) + form.offset) % v == 0
            want[h, q, k] = i - j < form.local or far or g >= kv_heads - form.dense_heads
    found = kept(form.mask(site), n, heads)
    assert torch.equal(found, want)
    assert torch.equal(found.any(0), torch.ones(n, n, dtype=torch.bool).tril()), "a key that no head sees"


def test_shards_of_a_bidirectional_site_are_the_same_in_every_head() -> None:
    n, form = 30, S2(block=2, local=2, vertical=3)
    want = torch.zeros(n, n, dtype=torch.bool)
    for q, k in itertools.product(range(n), range(n)):
        distance = q // 2 - k // 2
        want[q, k] = (max(distance - 1, 0) + max(-distance - 1, 0)) % 3 == 0
    assert torch.equal(kept(form.mask(spec(Full(), n, 4)), n, 4), want.expand(4, n, n))


def test_every_block_is_the_site_itself() -> None:
    assert torch.equal(kept(S2(vertical=1).mask(spec(CAUSAL, 9)), 9), kept(CAUSAL, 9))


@pytest.mark.parametrize(("heads", "group", "vertical"), [(8, 2, 8), (4, 2, 16)])
def test_shards_that_leave_blocks_out_are_a_reason(heads: int, group: int, vertical: int) -> None:
    miss = S2(vertical=vertical).applies(spec(CAUSAL, 9, heads, group))
    assert miss.code == "s2-coverage"
    assert S2(vertical=vertical, dense_heads=1).applies(spec(CAUSAL, 9, heads, group)) is None


def test_an_unknown_number_of_heads_is_a_reason() -> None:
    assert S2().applies(spec(CAUSAL, 9, "h")).code == "s2-heads"


@pytest.mark.parametrize("size", [1, 4, 9, 30])
@pytest.mark.parametrize("mask", [Full(), CAUSAL], ids=str)
def test_chunks(size: int, mask: Mask) -> None:
    at = torch.arange(9)
    same = at[:, None] // size == at // size
    assert torch.equal(kept(Chunked(size).mask(spec(mask, 9)), 9)[0], kept(mask, 9)[0] & same)


# ---------------------------------------------------------------- powers of two, views and times


@pytest.mark.parametrize("tokens", [*range(1, 25), 70])
@pytest.mark.parametrize(("block", "window", "sinks"), [(1, 1, 0), (1, 3, 1), (2, 1, 1), (4, 2, 0)])
def test_powers_of_two(tokens: int, block: int, window: int, sinks: int) -> None:
    form = PowerAttention(block, window, sinks)
    want = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q, k in itertools.product(range(tokens), range(tokens)):
        back = q // block - k // block
        want[q, k] = k <= q and (back < window or k // block < sinks or back & (back - 1) == 0)
    assert torch.equal(kept(form.mask(spec(CAUSAL, tokens)), tokens)[0], want)
    unknown = form.mask(spec(CAUSAL, "s", keys="s"))
    assert torch.equal(kept(unknown, tokens)[0], want), "where the length is not fixed"


@pytest.mark.parametrize(("window", "sinks", "layers"), [(1, 0, 7), (5, 1, 6)])
def test_every_block_is_reached_within_logarithmically_many_layers(
    window: int, sinks: int, layers: int
) -> None:
    step = kept(PowerAttention(1, window, sinks).mask(spec(CAUSAL, 128)), 128)[0].double()
    reached, taken = step, 1
    while not torch.equal(reached > 0, torch.ones(128, 128, dtype=torch.bool).tril()):
        reached, taken = ((reached @ step) > 0).double(), taken + 1
    assert taken == layers


def test_powers_look_back() -> None:
    assert PowerAttention().applies(spec(Full(), 9)).code == "pattern-needs-causal"


@pytest.mark.parametrize(("views", "times", "frame"), [(2, 3, 2), (3, 2, 1), (1, 4, 2), (4, 1, 2), (2, 2, 4)])
def test_views_and_times(views: int, times: int, frame: int) -> None:
    form, n = ViewTime(views, times, frame), views * times * frame
    place = [(v, t) for v in range(views) for t in range(times) for _ in range(frame)]
    want = torch.tensor([[a[0] == b[0] or a[1] == b[1] for b in place] for a in place])
    found = kept(form.mask(spec(Full(), n)), n)[0]
    assert torch.equal(found, want)
    assert found.double().mean().item() == pytest.approx((views + times - 1) / (views * times))


def test_other_frames_are_a_reason() -> None:
    miss = ViewTime(2, 3, 4).applies(spec(Full(), 16))
    assert miss.code == "pattern-tokens"
    assert miss.why.endswith("are 24 tokens, the site has 16")


# ---------------------------------------------------------------- all of them

FORMS = (
    Chunked(4),
    Neighborhood((4, 4), (3, 3), 1, 1),
    Neighborhood(16, 4, 2, 2, True),
    PowerAttention(2, 1, 1),
    S2(2, 1, 2),
    ViewTime(2, 4, 2),
)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_rewritten_spec_reads_back_and_hides_for_good(form) -> None:
    site = spec(CAUSAL, 16)
    new = form.rewrite(site)
    assert parse(str(new)) == new
    q, k, v = (torch.randn(1, 2, 16, 4, dtype=torch.float64) for _ in range(3))
    seen = kept(form.mask(site), 16, 2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen[None], scale=0.5)
    torch.testing.assert_close(new(q, k, v)[0], want, atol=1e-10, rtol=0)
    assert new.norm == Softmax(safe=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tiles_are_classed_as_their_pairs_are(form) -> None:
    mask = form.mask(spec(CAUSAL, 16))
    pairs = kept(mask, 16, 2)
    for q, k in itertools.product(range(0, 16, 4), range(0, 16, 4)):
        tile, found = pairs[:, q : q + 4, k : k + 4], mask.classify((q, q + 3), (k, k + 3), 16, 16)
        assert found in {"skip": {"skip", "mixed"}, "full": {"full", "mixed"}}.get(
            "full" if tile.all() else "skip" if not tile.any() else "", {"mixed"}
        )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cross_attention_is_a_reason(form) -> None:
    assert form.applies(spec(CAUSAL, 16, keys=12)).code == "pattern-needs-self-attention"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_plans_hold_them(form) -> None:
    plan = parse_forms(form).to_plan()
    assert parse_forms({p: [dict(f) for f in fs] for p, fs in plan.items()}).at("x") == (form,)


def test_padding_stays_in_the_mask() -> None:
    mask = Chunked(4).mask(spec(Padding("pad"), 8))
    assert mask.operands == ("pad",)
