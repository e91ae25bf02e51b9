"""Linear layers whose weights a library holds as codes of a few bits.

An adapter needs to know how large such a weight is and where it lies, no numbers of it.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CodedWeight", "is_quantized", "parameter_of"]


class CodedWeight(Tensor):
    """What is known of a weight that is there as codes; its entries mean nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def is_quantized(module: Any) -> bool:
    """Return whether a module is a linear layer that computes with a coded weight."""
    plain = module._parameters.get("weight")
    is_usable = plain is not None and not _is_code(plain) and plain.ndim == 2
    has_own_forward = type(module).forward is not nn.Linear.forward
    return (
        _sizes_of(module) is not None
        and has_own_forward
        and not is_usable
        and _first_code(module) is not None
    )


def _sizes_of(module: Any) -> tuple[int, int] | None:
    """Return the numbers of a linear layer's outputs and inputs, if it tells them."""
    outputs, inputs = (
        getattr(module, f"{side}_features", None) for side in ("out", "in")
    )
    if isinstance(outputs, int) and isinstance(inputs, int):
        return outputs, inputs
    return None


def parameter_of(module: Any, name: str) -> Any:
    """Return a module's parameter, or what is known of it; None if there is none.

    Args:
        module: A base module, or None.
        name: The parameter's name; that of a coded weight is ``weight``.
    """
    if name != "weight" or module is None or not is_quantized(module):
        return getattr(module, name, None)
    code, sizes = _first_code(module), _sizes_of(module)
    assert code is not None
    assert sizes is not None
    one = torch.empty((), dtype=torch.float32, device=code.device)
    return one.expand(sizes).as_subclass(CodedWeight)


def _first_code(module: nn.Module) -> Tensor | None:
    own = (*module._parameters.values(), *module._buffers.values())
    return next((each for each in own if each is not None and _is_code(each)), None)


def _is_code(tensor: Tensor) -> bool:
    is_number = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return not (is_number or tensor.is_complex())
