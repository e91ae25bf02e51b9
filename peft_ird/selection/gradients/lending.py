"""A model, lent for gradients and given back as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_ird.selection.randomness import seeded_devices

__all__ = ["borrowed", "requiring_grad"]

_OPTIONS = ("problem_type", "return_dict")  # of a configuration


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Lend a model for the gradients of its parameters; it comes back as it was.

    Inside, the model is in eval mode, every parameter is frozen and outputs have names.
    Modes, ``requires_grad``, ``grad``, the random state and buffers that a forward
    replaces (as some rotary embeddings do at another length) are restored, also on
    errors.

    Args:
        model: The model.
    """
    config: Any = getattr(model, "config", None)
    # The first forward sets one of them; without the other, outputs are tuples.
    options = {n: getattr(config, n) for n in _OPTIONS if hasattr(config, n)}
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    states = [(m, dict(m._buffers), _numbers(m)) for m in model.modules() if m._buffers]
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    has_cudnn = torch.backends.cudnn.enabled
    with (
        torch.random.fork_rng(seeded_devices()),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            model.eval()
            # cuDNN's recurrent layers have no backward pass in eval mode.
            torch.backends.cudnn.enabled = has_cudnn and not is_recurrent
            if "return_dict" in options:
                config.return_dict = True
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, buffers, numbers in states:
                module._buffers.update(buffers)
                module.__dict__.update(numbers)
            for name, value in options.items():
                setattr(config, name, value)
            torch.backends.cudnn.enabled = has_cudnn


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Return the numbers of a module, which may say what its buffers are for."""
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float)}


@contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters require gradients inside.

    Args:
        parameters: The parameters.
    """
    listed = list(parameters)
    try:
        for parameter in listed:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in listed:
            parameter.requires_grad_(False)
