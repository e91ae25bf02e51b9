"""A model, lent for gradients and given back as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_ird.selection.randomness import seeded_devices

__all__ = ["borrowed", "requiring_grad"]

_SMALL_BYTES = 1 << 20  # buffers of that size are copied beforehand

# Of configurations. The first forward sets one of them; without the other, outputs are
# tuples; caches are of no use; and a grouped product mixes the rows of samples.
_OPTIONS = ("problem_type", "return_dict", "use_cache", "_experts_implementation")


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Lend a model for the gradients of its parameters; it comes back as it was.

    Inside, the model is in eval mode, every parameter is frozen and outputs have names.
    Modes, ``requires_grad``, ``grad``, options, the random state and what a forward
    replaces (as buffers of some rotary embeddings at another length, or a state) or
    writes to (small buffers, and embeddings with a ``max_norm``) are restored, also on
    errors; outputs that it keeps on itself go.

    Args:
        model: The model.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    states = [(m, dict(m._buffers), _state(m)) for m in model.modules()]
    written = [(tensor, tensor._version, tensor.clone()) for tensor in _writable(model)]
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    has_cudnn = torch.backends.cudnn.enabled
    with (
        _configured(model),
        torch.random.fork_rng(seeded_devices()),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            model.eval()
            # cuDNN's recurrent layers have no backward pass in eval mode.
            torch.backends.cudnn.enabled = has_cudnn and not is_recurrent
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, buffers, state in states:
                module._buffers.update(buffers)
                for name, value in _state(module).items():
                    # Flags of what was set up may stay, a graph may not.
                    if (
                        name not in state
                        and getattr(value, "grad_fn", None) is not None
                    ):
                        del module.__dict__[name]
                module.__dict__.update(state)
            for tensor, version, before in written:
                if tensor._version != version:
                    with torch.no_grad():
                        tensor.copy_(before)
            torch.backends.cudnn.enabled = has_cudnn


@contextmanager
def _configured(model: nn.Module) -> Iterator[None]:
    """Set the options of a model and its parts as gradients of samples need them."""
    whole: Any = getattr(model, "config", None)
    parts = [module.__dict__.get("config") for module in model.modules()]
    configs = {id(each): each for each in (whole, *parts) if each is not None}
    options = [
        (each, {name: getattr(each, name) for name in _OPTIONS if hasattr(each, name)})
        for each in configs.values()
    ]
    try:
        for config, given in options:
            if config is whole and "return_dict" in given:
                config.return_dict = True
            if "use_cache" in given:
                config.use_cache = False
            if given.get("_experts_implementation") is not None:
                config._experts_implementation = "eager"
        yield
    finally:
        for config, given in options:
            for name, value in given.items():
                setattr(config, name, value)


def _state(module: nn.Module) -> dict[str, Any]:
    """Return a module's tensors, and numbers, which may say what buffers are for."""
    kinds = (int, float, torch.Tensor, type(None))
    return {name: v for name, v in vars(module).items() if isinstance(v, kinds)}


def _writable(model: nn.Module) -> Iterator[Tensor]:
    """Yield what a forward in eval mode might write to, as far as it can be copied."""
    plain = (b for b in model.buffers() if b.layout == torch.strided)
    small = (b for b in plain if b.nbytes <= _SMALL_BYTES)
    limited = (
        module.weight.detach()
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.max_norm is not None
    )
    yield from (t for t in (*small, *limited) if not t.is_inference())


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
