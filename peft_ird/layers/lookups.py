"""Rows that an embedding's own forward looks up, with deltas on them."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.embedding import plus_rows
from peft_ird.sparse.lending import unlent

__all__ = ["Lookups"]

_SIGNATURE = inspect.signature(F.embedding)


class Lookups(TorchFunctionMode):
    """Adds deltas to the rows that ``F.embedding`` takes out of a table, inside it.

    Args:
        base: The module that owns the table, as its ``weight``. It may be another
            tensor once hooks have run, as with offloaded weights.
        deltas: Those of the table.

    Attributes:
        are_all: Whether the table was used, and in no other way.
    """

    def __init__(self, base: nn.Module, deltas: Sequence[SparseDelta]) -> None:
        super().__init__()
        self._base = base
        self._deltas = deltas
        self._is_used = self._is_read = False

    @property
    def are_all(self) -> bool:
        """See the class."""
        return self._is_used and not self._is_read

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        table = self._base.weight
        if func is F.embedding:
            given = _SIGNATURE.bind(*args, **kwargs)
            given.apply_defaults()
            if given.arguments["weight"] is table and _is_plain(given.arguments):
                return self._looked_up(**given.arguments)
        result = func(*args, **kwargs)
        is_attribute = getattr(func, "__name__", "") == "__get__"
        is_fact = is_attribute and not isinstance(result, Tensor)  # shape and such
        if not is_fact and any(t is table for t in tree_leaves((args, kwargs))):
            self._is_read = True
        return result

    def _looked_up(self, **given: Any) -> Any:
        self._is_used = True
        with unlent(given["weight"]):
            y = F.embedding(**given)
        padding = given["padding_idx"]
        if padding is not None:
            padding %= len(given["weight"])
        for delta in self._deltas:
            y = plus_rows(y, given["input"], delta, padding)
        return y


def _is_plain(given: Mapping[str, Any]) -> bool:
    return given["max_norm"] is None and not given["scale_grad_by_freq"]
