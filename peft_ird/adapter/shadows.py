"""Weights of zeros beside coded ones, for as long as entries are ranked.

The gradient of a loss by a weight is that by whatever is added to it. So a linear layer
whose weight cannot be differentiated gets a second one, of zeros that take no memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ird.adapter.modules import base_modules, replace
from peft_ird.layers.quantized import is_quantized, parameter_of

__all__ = ["Shadow", "shadowed"]


class Shadow(nn.Linear):
    """A quantised linear layer, and a weight of zeros that its inputs meet as well.

    Args:
        layer: The layer; not changed. While it has its bias, that counts twice.
    """

    def __init__(self, layer: nn.Module) -> None:
        known: Tensor = parameter_of(layer, "weight")
        bias: Any = layer._parameters.get("bias")
        outputs, inputs = known.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        dtype = torch.float32 if bias is None else bias.dtype
        zero = torch.zeros((), dtype=dtype, device=known.device)
        self.weight = nn.Parameter(zero.expand(known.shape))
        self.bias = bias
        self._behind = (layer,)  # no module of this one: names stay as they are

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return what the layer does."""
        output: Tensor = self._behind[0](input)
        shown = F.linear(input.to(self.weight.dtype), self.weight, self.bias)
        return output + shown.to(output.dtype)


@contextmanager
def shadowed(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Give quantised layers a weight whose gradients can be asked for.

    Args:
        model: The base model.
        names: Modules that may be quantised.
    """
    modules = dict(base_modules(model))
    layers = [modules[name] for name in names if is_quantized(modules[name])]
    biases = [layer._parameters.get("bias") for layer in layers]
    shadows = [Shadow(layer) for layer in layers]
    try:
        for layer, shadow, bias in zip(layers, shadows, biases, strict=True):
            replace(model, layer, shadow)
            if bias is not None:
                layer._parameters["bias"] = None
        yield
    finally:
        for layer, shadow, bias in zip(layers, shadows, biases, strict=True):
            replace(model, shadow, layer)
            if bias is not None:
                layer._parameters["bias"] = bias
