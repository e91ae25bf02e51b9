"""Rows that were picked out of a batch by an index, which may come in any number."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Picked", "tensors"]

_INDEXED = {Tensor.__getitem__, torch.index_select, Tensor.index_select,
            torch.masked_select, Tensor.masked_select}  # fmt: skip
_GATHERED = {torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim}
_REPEATED = {torch.repeat_interleave, Tensor.repeat_interleave}
_JOINED = {torch.cat, torch.concat, torch.concatenate, torch.vstack}
_PICKING = {F.embedding, *_INDEXED, *_GATHERED, *_REPEATED, *_JOINED}


class Picked:
    """Knows the tensors whose rows are not those of the samples, in order.

    Args:
        size: Number of samples in the batch.
        tables: Addresses of what belongs to the model: rows of it are nobody's.
    """

    def __init__(self, size: int, tables: Collection[int] = ()) -> None:
        self.size = size
        self._tables = tables
        self._found: dict[int, Tensor] = {}  # held, so that no other gets the number

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found

    def clear(self) -> None:
        """Let go of the tensors."""
        self._found.clear()

    def note(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Look at a call: what is made of picked rows is picked till they are put back.

        They are put back into what has the shape of the result, as by ``index_add``.
        """
        if not self._found and func not in _PICKING:  # every call comes by here
            return
        given = tensors((*args, *kwargs.values()))
        others = {tensor.shape for tensor in given if tensor not in self}
        sizes = {size for tensor in given if tensor in self for size in _sizes(tensor)}
        for each in tensors((result,)):
            is_kept = not sizes.isdisjoint(_sizes(each))
            is_made = bool(sizes) and each.shape not in others
            if each.is_floating_point() and (
                is_kept or is_made or self._is_picked(func, args, kwargs, each.ndim)
            ):
                self._found[id(each)] = each

    def _is_picked(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], ndim: int
    ) -> bool:
        if func in _JOINED:
            dim = kwargs.get("dim", *args[1:2] or (0,))
            return dim in {0, -ndim} and not self._is_one_each(args[0])
        if func in _GATHERED:
            at = 1 if func in {torch.gather, Tensor.gather} else 2
            dim = kwargs.get("dim", *args[at : at + 1] or (None,))
            where = tensors((*args[1:], *kwargs.values()))[-1]
            return dim in {0, -ndim, None} and not self._are_whole(args[0], where)
        if func in _REPEATED:
            return isinstance(kwargs.get("repeats", *args[1:2] or (1,)), Tensor)
        if func is F.embedding:  # of what was computed; parameters are substituted
            return any(tensor.requires_grad for tensor in args[1:2])
        if func not in _INDEXED or not isinstance(args[0], Tensor):
            return False
        source, index = args[0], kwargs.get("index", args[-1])
        if source.untyped_storage().data_ptr() in self._tables:
            return False
        if isinstance(index, tuple):
            index = next((part for part in index if part is not None), None)
        return isinstance(index, Tensor) and not self._in_order(source, index)

    def _are_whole(self, source: Tensor, index: Tensor) -> bool:
        """Return whether what is gathered is whole rows, sorted, of each sample."""
        if not index.numel():
            return False
        rows = index.reshape(len(index), -1) if index.ndim else index.view(1, 1)
        is_same = torch.equal(rows, rows[:, :1].expand_as(rows))
        return is_same and self._in_order(source, rows[:, 0])

    def _is_one_each(self, pieces: Sequence[Tensor]) -> bool:
        """Return whether there is one piece for each sample, all of equal length."""
        lengths = {piece.shape[0] if piece.ndim else 0 for piece in pieces}
        return len(pieces) == self.size and len(lengths) == 1

    def _in_order(self, source: Tensor, index: Tensor) -> bool:
        """Return whether each sample gets as many of its rows, and they stay sorted."""
        if index.ndim == 0:
            return True
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        owner = index.flatten() // max(1, source.shape[0] // self.size)
        each, rest = divmod(len(owner), self.size)
        if rest:
            return False
        samples = torch.arange(self.size, device=owner.device)
        return torch.equal(owner, samples.repeat_interleave(each))


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values, and in lists and tuples among them.

    Args:
        values: Arguments or results of a call.
    """
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def _sizes(tensor: Tensor) -> set[tuple[str, int]]:
    """Return by which numbers the rows of a tensor are known again in others."""
    rows = tensor.shape[: max(1, tensor.ndim - 1)].numel()
    return {("rows", rows), ("first", tensor.shape[0] if tensor.ndim else 1)}
