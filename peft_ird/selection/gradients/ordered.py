"""Sums over batches, added in the order of the batches, whoever takes them."""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.pool import Pool

__all__ = ["OrderedSums", "bytes_per_entry"]

_TOGETHER_BYTES = 16 << 20  # of small parameters that processes exchange at once
_TABLE_BYTES = 64 << 20  # smaller ones cost more time than they take memory
_SLICE_BYTES = 4 << 20  # of one process's share of a large one


class OrderedSums:
    """A sum over batches for every entry of some parameters.

    Sums in float32 depend on their order. An only process takes the batches in order.
    Of several, each takes one batch of a round; after it, each adds what all of them
    found to its share of the entries, one after the other in the order of their ranks.
    So there is one addition an entry for each batch, the same for any number of
    processes, and the sums agree to the last bit, if what a batch adds does: on a GPU
    rows of a table are added in any order, and two runs may differ.

    Args:
        pool: The candidate entries.
        parts: Numbers of the parameters.
        ranks: The processes.
    """

    def __init__(self, pool: Pool, parts: Sequence[int], ranks: Ranks) -> None:
        self._blocks: dict[int, _Block] = {}
        self._found: dict[int, Tensor] = {}
        most = _TOGETHER_BYTES if ranks.size > 1 else 0
        for device, alike in groupby(parts, lambda p: pool.parameters[p].device):
            here = list(alike)
            sizes = [pool.sizes[part] for part in here]
            for places in pool.groups(most, pool.dtype.itemsize, sizes):
                some = [here[place] for place in places]
                total = sum(pool.sizes[part] for part in some)
                block = _Block(total, pool.dtype, device, ranks)
                views = block.found[:total].split([pool.sizes[part] for part in some])
                self._found.update(zip(some, views, strict=True))
                self._blocks.update(dict.fromkeys(some, block))

    def of(self, part: int) -> Tensor:
        """Return where a batch's sum over its samples is added, 1-D.

        Args:
            part: The parameter's number.
        """
        return self._found[part]

    def end_round(self, parts: Iterable[int]) -> None:
        """Add up what the processes found; all must call it alike.

        Args:
            parts: Numbers of the parameters that the round was about.
        """
        for block in dict.fromkeys(self._blocks[part] for part in parts):
            block.end_round()

    def end(self) -> list[Tensor]:
        """Return the sums, the same on all processes; `of` gives them from now on."""
        for block in dict.fromkeys(self._blocks.values()):
            block.end()
        self._blocks = {}
        return list(self._found.values())

    def pop(self, part: int) -> Tensor:
        """Return a parameter's sum, and do not hold on to it.

        Args:
            part: The parameter's number.
        """
        return self._found.pop(part)


class _Block:
    """Sums of some parameters, one behind the other.

    Args:
        size: Entries.
        dtype: Of the sums.
        device: Of the sums.
        ranks: The processes.
    """

    def __init__(
        self, size: int, dtype: torch.dtype, device: torch.device, ranks: Ranks
    ) -> None:
        self._ranks = ranks
        share = -(-size // ranks.size)  # rounded up
        self.found = _zeros(share * ranks.size, dtype, device)
        self._share = _zeros(share if ranks.size > 1 else 0, dtype, device)

    def end_round(self) -> None:
        for found, share in self._slices():
            for one in self._ranks.deal(found):
                share.add_(one)
            found.zero_()

    def end(self) -> None:
        for found, share in self._slices():
            found.copy_(self._ranks.collect(share))

    def _slices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is found for all processes, and this one's share, by the slice."""
        if self._ranks.size > 1:
            length = max(1, _SLICE_BYTES // self.found.element_size())
            found = self.found.view(self._ranks.size, -1).split(length, 1)
            yield from zip(found, self._share.split(length), strict=True)


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; of a large table in main memory, only what is added to is there.

    Of an embedding that is most: rows of words that are in no sample.
    """
    length = size * dtype.itemsize
    is_table = device.type == "cpu" and length >= _TABLE_BYTES
    if not is_table or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page is there for the sake of one row
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def bytes_per_entry(pool: Pool, ranks: Ranks) -> int:
    """Return what a sum takes: of several processes, each has a share of it more.

    Args:
        pool: The candidate entries.
        ranks: The processes.
    """
    size = pool.dtype.itemsize
    return size if ranks.size == 1 else size + -(-size // ranks.size)
