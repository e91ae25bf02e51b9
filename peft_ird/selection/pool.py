"""The candidate entries of a model: its targeted parameters, in order."""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from peft_ird.sparse.delta import index_dtype

__all__ = ["Pool"]

TensorTree = dict[str, dict[str, Tensor]]


class Pool:
    """The candidate entries, parameter by parameter, each flattened row-major.

    A parameter is known by its number here. What belongs to all candidates (scores,
    chosen positions) is a list with one 1-D tensor per parameter. Empty parameters
    are left out.

    Args:
        parameters: Module name, parameter name and parameter, in
            ``named_parameters`` order.
    """

    def __init__(self, parameters: Iterable[tuple[str, str, nn.Parameter]]) -> None:
        listed = [each for each in parameters if each[2].numel()]
        self.names = [(module, name) for module, name, _ in listed]
        self.parameters = [parameter for _, _, parameter in listed]
        self.sizes = [parameter.numel() for parameter in self.parameters]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; what is ranked ends up there."""
        return self.parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Type of gradients and scores: float64 for a float64 model, else float32."""
        dtypes = {parameter.dtype for parameter in self.parameters}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def name(self, number: int) -> str:
        """Return a parameter's full name."""
        return ".".join(self.names[number])

    def is_bias(self, number: int) -> bool:
        """Return whether a parameter is a bias: ``bias``, ``in_proj_bias``, …."""
        return "bias" in self.names[number][1].split("_")

    def modules(self) -> list[int]:
        """Return for each parameter the number of its module, from 0 upwards."""
        runs = [len(list(run)) for _, run in groupby(m for m, _ in self.names)]
        return [number for number, length in enumerate(runs) for _ in range(length)]

    def groups(
        self, most_bytes: int, entry_bytes: int, sizes: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Divide the parameters, in order, into groups of at most so many bytes.

        A parameter that is larger alone makes a group of its own.

        Args:
            most_bytes: Bytes of a group.
            entry_bytes: Bytes of an entry.
            sizes: Entries of each parameter that count. Default: all.
        """
        groups: list[list[int]] = [[]]
        taken = 0
        for number, size in enumerate(self.sizes if sizes is None else sizes):
            taken += size * entry_bytes
            if groups[-1] and taken > most_bytes:
                groups.append([])
                taken = size * entry_bytes
            groups[-1].append(number)
        return groups

    def tree(self, parts: Sequence[Tensor]) -> TensorTree:
        """Arrange one tensor per parameter by module and name, without empty ones."""
        tree: TensorTree = {}
        for (module, name), part in zip(self.names, parts, strict=True):
            if part.numel():
                tree.setdefault(module, {})[name] = part.cpu()
        return tree

    def indices(self, positions: Sequence[Tensor]) -> TensorTree:
        """Arrange sorted positions as `tree` does, int32 (int64 past 2^31), CPU."""
        return self.tree(
            [p.to(index_dtype(n)) for p, n in zip(positions, self.sizes, strict=True)]
        )
