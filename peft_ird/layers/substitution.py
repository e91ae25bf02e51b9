"""Calling a module with other parameters than its own."""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

__all__ = ["call_with_parameters", "lending", "with_forward", "with_parameters"]

_LENDING = threading.RLock()  # a module that is lent tensors may have others in it


def call_with_parameters(
    module: nn.Module,
    parameters: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a module, or the one inside tuner layers, with other parameters.

    Args:
        module: The module; it is as before afterwards.
        parameters: Tensors to compute with, by parameter name.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        What the module returns.
    """
    # A shallow copy breaks a compiled graph, and a forward that accelerate put on the
    # instance is bound to the original: there the module itself is lent the tensors.
    if torch.compiler.is_compiling() or _has_own_forward(module):
        prefix = "base_layer." * (len(_chain(module)) - 1)
        named = {prefix + name: tensor for name, tensor in parameters.items()}
        return torch.func.functional_call(module, named, args, kwargs)
    return with_parameters(module, parameters)(*args, **kwargs)


def lending(module: nn.Module) -> AbstractContextManager[Any]:
    """Have other threads wait where a module itself is lent tensors for a call.

    Args:
        module: What `call_with_parameters` calls; read its parameters inside.
    """
    is_lent = _has_own_forward(module) and not torch.compiler.is_compiling()
    return _LENDING if is_lent else nullcontext()


def _has_own_forward(module: nn.Module) -> bool:
    return any("forward" in each.__dict__ for each in _chain(module))


def _chain(module: nn.Module) -> list[nn.Module]:
    """Return a module, and those inside it if it is a tuner's layer."""
    chain = [module]
    while isinstance(chain[-1], BaseTunerLayer):
        chain.append(chain[-1].base_layer)
    return chain


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow copy of a module that computes with other parameters.

    Everything else is shared with the module, which is not touched: other threads and
    errors inside the call never see it changed.

    Args:
        module: A module, or a tuner layer around one.
        parameters: Tensors to compute with, by parameter name.
    """
    clone = _copied(module)
    if isinstance(module, BaseTunerLayer):
        inner = with_parameters(module.base_layer, parameters)
        clone._modules = {**module._modules, "base_layer": inner}
    else:
        for name in parameters:  # FSDP keeps views of its flat parameter there
            clone.__dict__.pop(name, None)
        clone._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item]
    return clone


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a shallow copy of a module with another forward, inside its own hooks.

    Args:
        module: A module, or a tuner layer around one, which then computes with it.
        forward: What the module, or the innermost one, does instead.
    """
    clone = _copied(module)
    if isinstance(module, BaseTunerLayer):
        inner = with_forward(module.base_layer, forward)
        clone._modules = {**module._modules, "base_layer": inner}
    else:
        clone.forward = forward
    return clone


def _copied(module: nn.Module) -> nn.Module:
    """Copy as torch's replicas are: modules with parametrisations refuse `copy`."""
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__.pop("_compiled_call_impl", None)  # calls the original
    return clone
