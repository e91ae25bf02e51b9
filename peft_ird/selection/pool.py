"""The candidate entries of a model, as one flat space."""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from peft_ird.sparse.delta import index_dtype

__all__ = ["Pool"]

TensorTree = dict[str, dict[str, Tensor]]


class Pool:
    """The candidate entries: parameters in order, each flattened row-major.

    A flat position counts through all parameters; ``split`` turns positions into
    indices per module and parameter.

    Args:
        parameters: Module name, parameter name and parameter, in
            ``named_parameters`` order.
    """

    def __init__(self, parameters: Iterable[tuple[str, str, nn.Parameter]]) -> None:
        listed = list(parameters)
        self.names = [(module, name) for module, name, _ in listed]
        self.parameters = [parameter for _, _, parameter in listed]
        self.offsets = [0, *accumulate(p.numel() for p in self.parameters)]

    def __len__(self) -> int:
        return self.offsets[-1]

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; flat tensors live there."""
        return self.parameters[0].device

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """float64 for a float64 model, else float32."""
        dtypes = {parameter.dtype for parameter in self.parameters}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def zeros(self) -> Tensor:
        """Return a flat accumulator of the pool's size."""
        return torch.zeros(len(self), dtype=self.accumulator_dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat tensor into one view per parameter, each 1-D."""
        return list(torch.split(flat, [p.numel() for p in self.parameters]))

    def bias_positions(self) -> Tensor:
        """Return the flat positions of biases: ``bias``, ``in_proj_bias`` and so on."""
        ranges = [
            torch.arange(start, end)
            for (_, name), start, end in zip(
                self.names, self.offsets, self.offsets[1:], strict=False
            )
            if "bias" in name.split("_")
        ]
        return torch.cat([torch.empty(0, dtype=torch.int64), *ranges]).to(self.device)

    def cut(self, positions: Tensor) -> list[Tensor]:
        """Cut sorted flat positions into positions inside each parameter, int64."""
        bounds = torch.tensor(self.offsets, device=positions.device)
        ends = torch.searchsorted(positions, bounds).tolist()
        return [
            positions[start:end] - offset
            for start, end, offset in zip(ends, ends[1:], self.offsets, strict=False)
        ]

    def split(self, positions: Tensor) -> TensorTree:
        """Return sorted indices per module and parameter, without empty ones.

        Args:
            positions: Sorted flat positions. Shape ``[k]``, int64.

        Returns:
            ``{module: {parameter: indices}}``, int32 (int64 past 2^31 entries), CPU.
        """
        parts = [
            part.to("cpu", index_dtype(parameter.numel()))
            for part, parameter in zip(
                self.cut(positions), self.parameters, strict=True
            )
        ]
        return self._tree(parts)

    def arrange(self, positions: Tensor, values: Tensor) -> TensorTree:
        """Return the values that belong to positions, in the layout of `split`."""
        counts = [part.numel() for part in self.cut(positions)]
        return self._tree([piece.cpu() for piece in torch.split(values, counts)])

    def _tree(self, parts: Iterable[Tensor]) -> TensorTree:
        tree: TensorTree = {}
        for (module, name), part in zip(self.names, parts, strict=True):
            if part.numel():
                tree.setdefault(module, {})[name] = part
        return tree

    def module_bounds(self) -> list[int]:
        """Return the offsets at which another module begins, with both ends."""
        starts = [
            offset
            for i, offset in enumerate(self.offsets[:-1])
            if i == 0 or self.names[i][0] != self.names[i - 1][0]
        ]
        return [*starts, len(self)]
