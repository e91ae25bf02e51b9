r"""Gradients of single samples, in the form that the backward pass hands them out.

The gradient of a linear layer's weight is never formed for a whole batch. Sample n
leaves its factors, :math:`g_n = L_n^\top R_n` (`Outer`), an embedding leaves the rows
that it looked up (`Rows`), everything small is there as it is (`Dense`).

Letters in shapes: ``n`` sample, ``t`` token, ``o`` rows and ``i`` columns of the
parameter, ``k`` chosen entries.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from peft_ird.selection.gradients.dense import Dense
from peft_ird.selection.gradients.entrywise import Entrywise, Pick
from peft_ird.selection.gradients.outer import Outer, join_outers
from peft_ird.selection.gradients.rows import Rows, join_rows
from peft_ird.selection.gradients.where import Where

__all__ = ["SampleGradients", "combine"]

_LOOKED_UP = 1 << 23  # entries of rows that are formed at once


class SampleGradients(Protocol):
    """Gradients of the samples of one batch with respect to one parameter."""

    def add_squares_(self, total: Tensor, kept: Sequence[int]) -> None:
        r"""Add :math:`\sum_n g_n^2` over the samples ``kept`` to ``total``, 1-D.

        The sum is formed first, and added to each entry once.
        """

    def add_sum_(self, total: Tensor, kept: Sequence[int]) -> None:
        r"""Add :math:`\sum_n g_n` over the samples ``kept`` to ``total``, as above."""

    def squared_norms(self, kept: Sequence[int]) -> Tensor:
        r"""Return :math:`\sum_j g_n[j]^2` of some samples. 1-D, float64."""

    def squared_norms_at(self, rows: Sequence[int], where: Where) -> Tensor:
        """Return the same over the chosen entries."""

    def squares_at(self, rows: Sequence[int], where: Where) -> Tensor:
        r"""Return :math:`\sum_n g_n[j]^2` of the chosen entries. Shape ``[k]``."""

    def at(self, rows: Sequence[int], where: Where) -> Tensor:
        """Return the chosen entries of some samples. Shape ``[len(rows), k]``."""

    def only(self, rows: Sequence[int], pick: Pick) -> "SampleGradients":
        """Return the gradients of some samples, which hold on to nothing of the others.

        Args:
            rows: The samples.
            pick: Returns their rows of a tensor; of the same tensor, the same ones.
        """

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors held."""


class OuterAndRows(Entrywise):
    """Gradients of a matrix that is an embedding and a linear layer at once.

    Args:
        outer: What the linear layer gives.
        rows: What the embedding adds.
    """

    def __init__(self, outer: Outer, rows: Rows) -> None:
        self.outer = outer
        self.rows = rows

    def add_squares_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        self._add_(
            total, kept, self.outer.add_squares_, lambda sums, g: sums.addcmul_(g, g)
        )

    def add_sum_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        self._add_(total, kept, self.outer.add_sum_, Tensor.add_)

    def _add_(
        self,
        total: Tensor,
        kept: Sequence[int],
        add_outer: Callable[[Tensor, Sequence[int]], None],
        add_one: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Add what the linear layer gives; rows that are looked up are summed apart."""
        matrix = total.view(self.outer.shape)
        row = torch.cat([self.rows.part(n)[0] for n in kept]).unique()
        before = matrix[row]
        add_outer(total, kept)
        size = max(1, _LOOKED_UP // matrix.shape[1])
        for some, sums in zip(row.split(size), before.split(size), strict=True):
            found = torch.zeros_like(sums)
            for n in kept:
                add_one(found, self._rows_at(n, some))
            matrix[some] = sums.add_(found)

    def _rows_at(self, n: int, some: Tensor) -> Tensor:
        """Return some rows of sample n's gradient, in ascending order."""
        row, values = self.rows.part(n)
        is_wanted = torch.isin(row, some)
        place = torch.searchsorted(some, row[is_wanted])
        return self.outer.rows_at(n, some).index_add_(0, place, values[is_wanted])

    def _more(self, n: int) -> tuple[Tensor, Tensor]:
        """Return (a + b)^2 - a^2 where the embedding adds b to the linear layer's a."""
        row, values = self.rows.part(n)
        return row, (2 * self.outer.rows_at(n, row) + values) * values

    def squared_norms(self, kept: Sequence[int]) -> Tensor:
        """See `SampleGradients`."""
        more = torch.stack([self._more(n)[1].double().sum() for n in kept])
        return self.outer.squared_norms(kept) + more

    def at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        return self.outer.at(rows, where) + self.rows.at(rows, where)

    def only(self, rows: Sequence[int], pick: Pick) -> "OuterAndRows":
        """See `SampleGradients`."""
        return OuterAndRows(self.outer.only(rows, pick), self.rows.only(rows, pick))

    def tensors(self) -> Iterator[Tensor]:
        """See `SampleGradients`."""
        yield from self.outer.tensors()
        yield from self.rows.tensors()


def combine(uses: Sequence[SampleGradients]) -> SampleGradients | None:
    """Sum the gradients from several uses of one parameter, sample by sample.

    Args:
        uses: At least one; all of the same samples.

    Returns:
        The sum; None if the uses' gradients have no common form.
    """
    if len(uses) == 1:
        return uses[0]
    outers = [use for use in uses if isinstance(use, Outer)]
    rows = [use for use in uses if isinstance(use, Rows)]
    dense = [use for use in uses if isinstance(use, Dense)]
    if len(dense) == len(uses):
        return Dense(torch.stack([use.values for use in dense]).sum(0))
    if dense or len(outers) + len(rows) < len(uses):
        return None
    joined = [join_outers(outers)] if outers else []
    looked_up = [join_rows(rows)] if rows else []
    if joined and looked_up:
        return OuterAndRows(joined[0], looked_up[0])
    return joined[0] if joined else looked_up[0]
