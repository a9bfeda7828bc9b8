from __future__ import annotations

import pytest
import torch

from attnc.block_list import BlockList
from attnc.errors import UnsupportedError
from attnc.masks import CAUSAL, And, Band, Grid, Or, Padding, Range

SHAPES = [(1, 1, 1, 1), (1, 1, 5, 7), (2, 3, 4, 6), (2, 1, 3, 5), (1, 4, 6, 2), (1, 1, 3, 0), (1, 2, 0, 3)]


def draw(shape, density: float = 0.4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g) < density, torch.rand(shape, generator=g) < 0.5


def rows(blocks: BlockList) -> list[tuple[list[int], list[int]]]:
    """Read every row as a person would: the full blocks and the partial ones."""
    bounds = blocks.ranges.flatten(0, 2).tolist()
    return [(blocks.columns[a:b].tolist(), blocks.columns[b:c].tolist()) for a, b, c in bounds]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_a_list_holds_full_blocks_then_partial_ones_in_order(shape, density):
    listed, full = draw(shape, density)
    blocks = BlockList.from_dense(listed, full, block=(64, 32))
    blocks.check()
    for row, (x, f) in zip(
        rows(blocks), zip(listed.flatten(0, 2), full.flatten(0, 2), strict=True), strict=True
    ):
        assert row == ((x & f).nonzero().flatten().tolist(), (x & ~f).nonzero().flatten().tolist())
    assert len(blocks.columns) == int(listed.sum())
    assert (blocks.height, blocks.width) == shape[2:]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_list_gives_back_what_it_was_made_of(shape):
    listed, full = draw(shape)
    blocks = BlockList.from_dense(listed, full)
    assert torch.equal(blocks.to_dense(), listed)
    assert torch.equal(blocks.to_dense_full(), listed & full)
    assert blocks.density == pytest.approx(listed.float().mean().nan_to_num().item(), abs=1e-6)
    assert not BlockList.from_dense(listed).to_dense_full().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transposed_list_walks_the_same_blocks_by_key(shape):
    listed, full = draw(shape)
    turned = BlockList.from_dense(listed, full, block=(64, 32)).transpose()
    turned.check()
    assert turned.block == (32, 64)
    assert torch.equal(turned.to_dense(), listed.mT)
    assert torch.equal(turned.to_dense_full(), (listed & full).mT)
    assert torch.equal(turned.transpose().to_dense(), listed)


MASKS = (CAUSAL, Band(70, 0), Band(30, 10, "end"), And((CAUSAL, Or((Band(40, 0), Range("k", 0, 20))))))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (200, 200), (130, 257), (257, 64)])
def test_a_list_from_a_mask_loses_no_pair_and_claims_nothing_false(mask, sq, sk):
    blocks = BlockList.from_mask(mask, sq, sk, block=(64, 32))
    blocks.check()
    blocks.expect(3, 5, sq, sk)
    keep = mask.keep(Grid(sq, sk, torch.device("cpu"), {})).expand(1, 1, sq, sk)
    pairs = blocks.to_pairs(sq, sk)
    assert pairs.shape == (1, 1, sq, sk)
    assert not (keep & ~pairs).any()
    full = BlockList.from_dense(blocks.to_dense_full(), block=(64, 32)).to_pairs(sq, sk)
    assert not (full & ~keep).any()
    assert blocks.to_dense_full().any() or min(sq, sk) < 100


def test_chosen_blocks_are_met_with_the_mask_and_keep_its_claims():
    chosen, _ = draw((2, 3, 4, 8), 0.6)
    blocks = BlockList.from_mask(CAUSAL, 256, 256, block=(64, 32), chosen=chosen)
    whole = BlockList.from_mask(CAUSAL, 256, 256, block=(64, 32))
    assert torch.equal(blocks.to_dense(), whole.to_dense() & chosen)
    assert torch.equal(blocks.to_dense_full(), whole.to_dense_full() & chosen)
    with pytest.raises(ValueError, match=r"expected chosen blocks \[B, H, 4, 8\], found \[2, 3, 8, 4\]"):
        BlockList.from_mask(CAUSAL, 256, 256, block=(64, 32), chosen=chosen.mT)


def test_run_time_data_make_blocks_partial():
    blocks = BlockList.from_mask(And((CAUSAL, Padding("keep"))), 128, 128, block=(64, 64))
    assert rows(blocks) == [([], [0]), ([], [0, 1])]


def test_a_long_mask_is_listed_without_its_pairs():
    blocks = BlockList.from_mask(Band(4095, 0), 65536, 65536)  # 4e9 pairs
    assert blocks.to_dense().sum(-1).flatten().tolist() == [min(i, 32) + 1 for i in range(512)]
    assert blocks.to_dense_full().sum(-1).flatten().tolist() == [min(i, 31) for i in range(512)]


def test_the_order_puts_long_rows_first_and_counts_broadcast_heads():
    listed = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)[None, None]
    blocks = BlockList.from_dense(listed)
    assert blocks.order(1, 1).tolist() == [1, 3, 0, 2]
    assert blocks.order(2, 1).tolist() == [1, 5, 3, 7, 0, 4, 2, 6]
    assert blocks.order(1, 2).dtype == torch.int32
    per_head = BlockList.from_dense(torch.cat([listed, listed.flip(2)], 1))
    assert per_head.order(1, 2).tolist() == [1, 6, 3, 4, 0, 7, 2, 5]


def test_heads_can_be_cut_out_and_columns_may_have_room():
    listed, full = draw((2, 3, 4, 6))
    blocks = BlockList.from_dense(listed, full)
    some = BlockList(blocks.ranges[:, 1:2], torch.cat([blocks.columns, blocks.columns.new_full((9,), 77)]), 6)
    some.check()
    assert torch.equal(some.to_dense(), listed[:, 1:2])


@pytest.mark.parametrize(
    ("ranges", "columns", "expected"),
    [
        ([[0, 0, 3]], [0, 1], "begin <= partial <= end within 0..2"),
        ([[1, 0, 2]], [0, 1], "begin <= partial <= end"),
        ([[-1, 0, 1]], [0, 1], "begin <= partial <= end"),
        ([[0, 0, 0], [0, 0, 5]], [0, 1, 2, 3, 0], "at most 4 blocks"),
        ([[0, 0, 2]], [0, 4], "key blocks of 0..3"),
        ([[0, 1, 2]], [-1, 2], "key blocks of 0..3"),
        ([[0, 0, 2]], [2, 1], "ascending key blocks"),
        ([[0, 2, 2]], [1, 1], "ascending key blocks"),
        ([[0, 1, 2]], [3, 3], "each key block once"),
    ],
)
def test_a_wrong_list_is_found_when_asked(ranges, columns, expected):
    blocks = BlockList(
        torch.tensor([[ranges]], dtype=torch.int32), torch.tensor(columns, dtype=torch.int32), 4
    )
    with pytest.raises(ValueError, match=rf"row \[0, 0, {len(ranges) - 1}\] .*{expected}"):
        blocks.check()


def test_full_blocks_may_come_after_partial_ones_of_lower_number():
    BlockList(torch.tensor([[[[0, 2, 4]]]], dtype=torch.int32), torch.tensor([1, 3, 0, 2]).int(), 4).check()


def test_wrong_tensors_are_named():
    ranges, columns = torch.zeros(1, 1, 2, 3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"multiples of 16 tokens, found \(64, 40\)"):
        BlockList(ranges, columns, 4, (64, 40))
    with pytest.raises(ValueError, match=r"ranges as torch.int32 \[B, H, Mq, 3\], found torch.int64"):
        BlockList(ranges.long(), columns, 4)
    with pytest.raises(ValueError, match=r"found torch.int32 \[1, 1, 3, 2\]"):
        BlockList(ranges.mT, columns, 4)
    with pytest.raises(ValueError, match=r"columns as torch.int32 \[L\], found torch.int32 \[1, 4\]"):
        BlockList(ranges, columns[None], 4)
    with pytest.raises(ValueError, match="one device, found cpu and meta"):
        BlockList(ranges, columns.to("meta"), 4)
    with pytest.raises(UnsupportedError, match="expected no level"):
        BlockList(ranges, columns, 4, level=columns)
    with pytest.raises(ValueError, match=r"torch.bool \[B, H, Mq, Nk\], found torch.float32 \[2, 3\]"):
        BlockList.from_dense(torch.zeros(2, 3))


def test_a_list_for_other_sizes_is_refused():
    blocks = BlockList.from_dense(torch.ones(2, 1, 2, 3, dtype=torch.bool), block=(64, 32))
    blocks.expect(2, 8, 65, 96)
    with pytest.raises(
        ValueError, match=r"expected \[3, 3\] blocks of \(64, 32\) in 129 queries and 96 keys"
    ):
        blocks.expect(2, 8, 129, 96)
    with pytest.raises(ValueError, match="1 or 3 batch entries and 1 or 8 heads"):
        blocks.expect(3, 8, 65, 96)


@pytest.mark.gpu
def test_a_list_is_made_on_a_gpu_without_waiting_for_it():
    listed, full = (x.cuda() for x in draw((2, 3, 4, 6)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        blocks = BlockList.from_dense(listed, full)
        turned, order = blocks.transpose(), blocks.order(2, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    blocks.check()
    turned.check()
    assert torch.equal(turned.to_dense(), listed.mT)
    assert sorted(order.tolist()) == list(range(24))
