"""Lists of blocks: which key blocks each row of query blocks visits, as block-sparse forms hand them over.

A block is ``block[0]`` queries by ``block[1]`` keys; the last row and the last column of blocks may be cut
short.  A listed block contributes, one that is not listed is hidden from its queries for good, as by -inf,
whatever the spec's fill.  Within a listed block the spec's mask holds; a block that is listed as full claims
that the mask hides nothing in it, so that kernels need not evaluate it there.

Source: Flex Attention (arXiv:2412.05496), section 4.2 (block masks, full and partial).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.errors import UnsupportedError
from attnc.mask_tiles import FULL, SKIP, classify
from attnc.masks import Mask

_MOST = 1 << 31


@dataclass(frozen=True, slots=True, eq=False)
class BlockList:
    """The listed blocks of a score matrix, row by row.

    ``ranges`` is int32 ``[B or 1, H or 1, Mq, 3]`` over batch entries, query heads and rows of blocks: where
    the row begins in ``columns``, where its partial blocks begin, and where it ends.  ``columns`` is int32
    ``[L]``: numbers of key blocks, the full ones of a row first, then the partial ones, both ascending.
    ``width`` is the number of key blocks, ``block`` the tokens in a block (queries, keys), multiples of 16.

    A row has a range of its own, and not only an offset as in CSR: lists that hold equally many blocks per
    row need no scan, a view of some heads is a list too, and ``columns`` may have room to spare, so that a
    list can be made on a GPU without waiting for its length.

    ``level`` is reserved for forms that give far blocks coarser keys (one key for ``2**level``): int8 ``[L]``
    beside ``columns``, by which a kernel would choose among pooled keys and values.  Nothing reads it yet.

    Nothing here waits for a GPU except ``check`` and ``density``, which say so.

    Raises:
        ValueError: shapes, dtypes or devices are not these.
        UnsupportedError: ``level`` is given.
    """

    ranges: Tensor
    columns: Tensor
    width: int
    block: tuple[int, int] = (128, 128)
    level: Tensor | None = None

    def __post_init__(self) -> None:
        if self.level is not None:
            raise UnsupportedError("block list: expected no level, which no kernel reads, found one")
        if len(self.block) != 2 or any(n < 16 or n % 16 for n in self.block):
            raise ValueError(f"block list: expected blocks of multiples of 16 tokens, found {self.block}")
        for name, x, dims in (("ranges", self.ranges, 4), ("columns", self.columns, 1)):
            if x.dtype != torch.int32 or x.dim() != dims or (dims == 4 and x.shape[3] != 3):
                shape = "[B, H, Mq, 3]" if dims == 4 else "[L]"
                found = f"{x.dtype} {list(x.shape)}"
                raise ValueError(f"block list: expected {name} as torch.int32 {shape}, found {found}")
        if self.ranges.device != self.columns.device:
            found = f"{self.ranges.device} and {self.columns.device}"
            raise ValueError(f"block list: expected one device, found {found}")

    @classmethod
    def from_dense(
        cls, listed: Tensor, full: Tensor | None = None, *, block: tuple[int, int] = (128, 128)
    ) -> BlockList:
        """List the blocks that are True in ``listed``, bool ``[B or 1, H or 1, Mq, Nk]``.

        ``full`` (broadcasts to it) says in which of them the mask hides nothing; None claims none.  On a GPU
        ``columns`` gets room for all blocks, since their number is not known here.

        Raises:
            ValueError: ``listed`` is no such tensor, or has 2**31 blocks or more.
        """
        if listed.dtype != torch.bool or listed.dim() != 4:
            found = f"{listed.dtype} {list(listed.shape)}"
            raise ValueError(f"block list: expected torch.bool [B, H, Mq, Nk], found {found}")
        if listed.numel() >= _MOST:
            raise ValueError(f"block list: expected fewer than 2**31 blocks, found {listed.numel()}")
        first = torch.zeros_like(listed) if full is None else listed & full
        then = listed & ~first
        counts, head = listed.sum(-1), first.sum(-1)
        end = counts.flatten().cumsum(0).view_as(counts)
        begin = end - counts
        ranges = torch.stack([begin, begin + head, end], -1).int()
        rank = torch.where(first, first.cumsum(-1), head[..., None] + then.cumsum(-1)) - 1
        room = listed.numel() if listed.is_cuda else int(counts.sum())
        place = torch.where(listed, begin[..., None] + rank, room)
        numbers = torch.arange(listed.shape[3], dtype=torch.int32, device=listed.device).expand_as(listed)
        columns = numbers.new_zeros(room + 1).scatter_(0, place.flatten(), numbers.flatten())
        return cls(ranges, columns[:room], listed.shape[3], block)

    @classmethod
    def from_mask(
        cls,
        mask: Mask,
        sq: int,
        sk: int,
        *,
        block: tuple[int, int] = (128, 128),
        chosen: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockList:
        """List the blocks in which ``mask`` shows a key, for ``sq`` queries and ``sk`` keys.

        No pair is looked at: blocks are classed by position (``attnc.mask_tiles``), and what run-time data
        decide counts as partial.
        ``chosen``, bool ``[B or 1, H or 1, Mq, Nk]``, keeps some of the blocks only.

        Raises:
            UnsupportedError: a predicate that cannot be classed.
            ValueError: ``chosen`` has another shape.
        """
        kinds = classify(mask, sq, sk, block).to(device if chosen is None else chosen.device)
        if chosen is not None and chosen.shape[2:] != kinds.shape:
            wanted = f"[B, H, {kinds.shape[0]}, {kinds.shape[1]}]"
            raise ValueError(f"block list: expected chosen blocks {wanted}, found {list(chosen.shape)}")
        listed = (kinds != SKIP)[None, None]
        return cls.from_dense(listed if chosen is None else listed & chosen, kinds == FULL, block=block)

    @property
    def height(self) -> int:
        """The number of rows of blocks."""
        return self.ranges.shape[2]

    @property
    def density(self) -> float:
        """The share of blocks that are listed; waits for a GPU."""
        listed = (self.ranges[..., 2] - self.ranges[..., 0]).sum(dtype=torch.int64)
        return int(listed) / max(1, self.ranges[..., 0].numel() * self.width)

    def to(self, device: torch.device | str) -> BlockList:
        """Return the list on a device."""
        return replace(self, ranges=self.ranges.to(device), columns=self.columns.to(device))

    def to_dense(self) -> Tensor:
        """Return which blocks are listed, bool ``[B or 1, H or 1, Mq, Nk]``."""
        return self._spread(self.ranges[..., 2])

    def to_dense_full(self) -> Tensor:
        """Return which blocks are listed as full, bool ``[B or 1, H or 1, Mq, Nk]``."""
        return self._spread(self.ranges[..., 1])

    def to_pairs(self, sq: int, sk: int) -> Tensor:
        """Return which pairs lie in listed blocks, bool ``[B or 1, H or 1, Sq, Sk]``, for oracles."""
        rows, columns = self.block
        high = self.to_dense().repeat_interleave(rows, 2)[:, :, :sq]
        return high.repeat_interleave(columns, 3)[..., :sk]

    def transpose(self) -> BlockList:
        """Return the same blocks column by column: which rows of queries each key block is visited by.

        ``block`` is turned over with them.  The backward of keys and values walks such a list.
        """
        listed, full = self.to_dense().mT, self.to_dense_full().mT
        return BlockList.from_dense(listed, full, block=(self.block[1], self.block[0]))

    def order(self, batch: int, heads: int) -> Tensor:
        """Return all rows of a call, longest first, int32 ``[batch * heads * Mq]``.

        Rows of one length stay in order, so that rows of one head run next to each other.  Row ``i`` of head
        ``h`` in batch entry ``b`` is number ``(b * heads + h) * Mq + i``.
        """
        counts = (self.ranges[..., 2] - self.ranges[..., 0]).expand(batch, heads, -1)
        return counts.flatten().argsort(descending=True, stable=True).int()

    def expect(self, batch: int, heads: int, sq: int, sk: int) -> None:
        """Raise if the list is not one for a call of these sizes.

        Raises:
            ValueError: batch entries, heads or lengths do not fit.
        """
        wanted = (-(-sq // self.block[0]), -(-sk // self.block[1]))
        found = (self.height, self.width)
        if found != wanted:
            sizes = f"{self.block} in {sq} queries and {sk} keys"
            raise ValueError(f"block list: expected {list(wanted)} blocks of {sizes}, found {list(found)}")
        if self.ranges.shape[0] not in (1, batch) or self.ranges.shape[1] not in (1, heads):
            sizes = f"1 or {batch} batch entries and 1 or {heads} heads"
            raise ValueError(f"block list: expected {sizes}, found {list(self.ranges.shape[:2])}")

    def check(self) -> None:
        """Read the list and raise if it is not one; waits for a GPU.

        Raises:
            ValueError: a row lies outside of ``columns``, or its numbers are not ascending, or not within
                ``width``, or one is there twice.
        """
        begin, split, end = self.ranges.unbind(-1)
        within = (begin >= 0) & (begin <= split) & (split <= end) & (end <= len(self.columns))
        self._expect(within, f"a range begin <= partial <= end within 0..{len(self.columns)}")
        self._expect(end - begin <= self.width, f"at most {self.width} blocks")
        numbers, exists = self._numbers(end)
        self._expect((numbers >= 0) & (numbers < self.width) | ~exists, f"key blocks of 0..{self.width - 1}")
        rising = numbers[..., 1:] > numbers[..., :-1]
        place = begin[..., None] + torch.arange(1, max(1, self.width), device=begin.device)
        self._expect(rising | ~exists[..., 1:] | (place == split[..., None]), "ascending key blocks")
        self._expect(self.to_dense().sum(-1) == end - begin, "each key block once")

    def _expect(self, holds: Tensor, what: str) -> None:
        """Raise and name the first row ``[b, h, i]`` for which something does not hold."""
        broken = (~holds).nonzero()
        if len(broken):
            row = broken[0, :3].tolist()
            begin, split, end = self.ranges[tuple(row)].tolist()
            found = f"full {self.columns[begin:split].tolist()}, partial {self.columns[split:end].tolist()}"
            where = f"row {row} with range {[begin, split, end]}"
            raise ValueError(f"block list: {where}: expected {what}, found {found}")

    def _numbers(self, end: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key blocks of rows up to ``end``, ``[B, H, Mq, width]``, and which of these exist."""
        at = self.ranges[..., :1] + torch.arange(self.width, device=self.ranges.device)
        exists = at < end[..., None]
        some = self.columns if len(self.columns) else self.columns.new_zeros(1)
        return some[torch.where(exists, at, 0)], exists

    def _spread(self, end: Tensor) -> Tensor:
        numbers, exists = self._numbers(end)
        room = torch.zeros(*exists.shape[:3], self.width + 1, dtype=torch.bool, device=exists.device)
        return room.scatter_(3, torch.where(exists, numbers.long(), self.width), True)[..., : self.width]
