"""Rows that were picked out of a batch by an index, which may come in any number."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Picked", "tensors"]

# Functions that pick rows, and the names of their arguments.
_INDEXED: dict[Any, tuple[str, ...]] = {
    Tensor.__getitem__: ("input", "index"),
    **dict.fromkeys([torch.masked_select, Tensor.masked_select], ("input", "index")),
    **dict.fromkeys(
        [torch.index_select, Tensor.index_select], ("input", "dim", "index")
    ),
}
_GATHERED = {
    **dict.fromkeys([torch.gather, Tensor.gather], ("input", "dim", "index")),
    **dict.fromkeys(
        [torch.take_along_dim, Tensor.take_along_dim], ("input", "indices", "dim")
    ),
}
_REPEATED = dict.fromkeys(
    [torch.repeat_interleave, Tensor.repeat_interleave], ("input", "repeats", "dim")
)
_JOINED = dict.fromkeys(
    [torch.cat, torch.concat, torch.concatenate, torch.vstack, torch.stack],
    ("tensors", "dim"),
)
_NAMES: dict[Any, tuple[str, ...]] = {
    **_INDEXED, **_GATHERED, **_REPEATED, **_JOINED,
    F.embedding: ("input", "weight"),
}  # fmt: skip


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
        if not self._found and func not in _NAMES:  # every call comes by here
            return
        given = tensors((*args, *kwargs.values()))
        others = {tensor.shape for tensor in given if tensor not in self}
        sizes = {size for tensor in given if tensor in self for size in _sizes(tensor)}
        for each in tensors((result,)):
            is_kept = not sizes.isdisjoint(_sizes(each))
            is_made = bool(sizes) and each.shape not in others
            if each.dtype == torch.bool:
                continue
            if is_kept or is_made or self._is_picked(func, args, kwargs, each.ndim):
                self._found[id(each)] = each

    def _is_picked(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], ndim: int
    ) -> bool:
        if func not in _NAMES:
            return False
        given = {**dict(zip(_NAMES[func], args, strict=False)), **kwargs}
        source, dim = given.get("input"), given.get("dim", 0)
        if func in _JOINED:
            return dim in {0, -ndim} and not self._is_one_each(given["tensors"], func)
        if func in _REPEATED:
            return isinstance(given.get("repeats", 1), Tensor)
        if func is F.embedding:  # of what was computed; parameters are substituted
            return bool(given["weight"].requires_grad)
        if not isinstance(source, Tensor) or dim not in {0, -source.ndim, None}:
            return False
        if func in _GATHERED:
            return not self._are_whole(source, given.get("index", given.get("indices")))
        if source.untyped_storage().data_ptr() in self._tables:
            return False
        index = given.get("index", given.get("mask"))
        if isinstance(index, tuple):
            index = next((part for part in index if part is not None), None)
        if isinstance(index, list) or hasattr(index, "__array__"):
            index = torch.as_tensor(index)
        return isinstance(index, Tensor) and not self._in_order(source, index)

    def _are_whole(self, source: Tensor, index: Any) -> bool:
        """Return whether what is gathered is whole rows, sorted, of each sample."""
        if not index.numel():
            return False
        rows = index.reshape(len(index), -1) if index.ndim else index.view(1, 1)
        is_same = torch.equal(rows, rows[:, :1].expand_as(rows))
        return is_same and self._in_order(source, rows[:, 0])

    def _is_one_each(self, pieces: Sequence[Tensor], func: Any) -> bool:
        """Return whether there is one piece for each sample, all of equal length.

        What is stacked may be anything; rows of one tensor must be in order.
        """
        places = [piece.storage_offset() for piece in pieces]
        storages = {piece.untyped_storage().data_ptr() for piece in pieces}
        if len(storages) == 1 and places != sorted(places):
            return False
        lengths = {piece.shape[0] if piece.ndim else 0 for piece in pieces}
        is_each = len(pieces) == self.size and len(lengths) == 1
        return is_each or func is torch.stack

    def _in_order(self, source: Tensor, index: Tensor) -> bool:
        """Return whether each sample gets as many of its rows, and they stay sorted."""
        if index.ndim == 0:
            return True
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        owner = index.flatten().long() // max(1, source.shape[0] // self.size)
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
