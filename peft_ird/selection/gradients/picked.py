"""Rows that were picked out of a batch by an index, which may come in any number."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Picked"]

_INDEXED = {Tensor.__getitem__, torch.index_select, Tensor.index_select,
            torch.masked_select, Tensor.masked_select}  # fmt: skip


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

    def note(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Look at a call: rows that are picked stay so while their number is kept."""
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        if self._is_picked(func, args) or any(
            isinstance(arg, Tensor)
            and arg in self
            and arg.shape[:1] == result.shape[:1]
            for arg in args
        ):
            self._found[id(result)] = result

    def _is_picked(self, func: Any, args: tuple[Any, ...]) -> bool:
        if func not in _INDEXED or not isinstance(args[0], Tensor):
            return False
        source, index = args[0], args[-1]
        if isinstance(index, tuple):
            index = index[0] if index else None
        if not isinstance(index, Tensor) or index.ndim == 0:
            return False
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        owner = index.flatten() // max(1, source.shape[0] // self.size)
        each, rest = divmod(len(owner), self.size)
        if rest:
            return True
        samples = torch.arange(self.size, device=owner.device)
        return not torch.equal(owner, samples.repeat_interleave(each))
