"""Rows that were picked out of a batch by an index, which may come in any number."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Picked"]

_INDEXED = {Tensor.__getitem__, torch.index_select, Tensor.index_select,
            torch.masked_select, Tensor.masked_select}  # fmt: skip
_GATHERED = {torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim}
_JOINED = {torch.cat, torch.concat, torch.concatenate, torch.vstack}


class Picked:
    """Knows the tensors whose rows are not those of the samples, in order.

    Args:
        size: Number of samples in the batch.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._found: dict[int, Tensor] = {}  # held, so that no other gets the number

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found

    def clear(self) -> None:
        """Let go of the tensors."""
        self._found.clear()

    def note(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Look at a call: rows that are picked stay so while their number is kept."""
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        number = _rows(result)
        if self._is_picked(func, args, kwargs, result.ndim) or any(
            isinstance(arg, Tensor) and arg in self and _rows(arg) == number
            for arg in args
        ):
            self._found[id(result)] = result

    def _is_picked(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], ndim: int
    ) -> bool:
        if func in _JOINED:
            dim = kwargs.get("dim", *args[1:2] or (0,))
            return dim in {0, -ndim} and not self._is_one_each(args[0])
        if func in _GATHERED:
            at = 1 if func in {torch.gather, Tensor.gather} else 2
            return kwargs.get("dim", *args[at : at + 1] or (None,)) in {0, -ndim, None}
        if func is F.embedding:  # of what was computed; parameters are substituted
            return any(tensor.requires_grad for tensor in args[1:2])
        if func not in _INDEXED or not isinstance(args[0], Tensor):
            return False
        source, index = args[0], args[-1]
        if isinstance(index, tuple):
            index = next((part for part in index if part is not None), None)
        return isinstance(index, Tensor) and not self._in_order(source, index)

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


def _rows(tensor: Tensor) -> int:
    """Return the number of vectors in a tensor, or of numbers in a vector."""
    return tensor.shape[: max(1, tensor.ndim - 1)].numel()
