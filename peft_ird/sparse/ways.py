"""How deltas are applied, and how the gradients of their values are computed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from peft_ird.sparse.products import METHODS, has_triton

__all__ = [
    "WAYS",
    "forced",
    "gradient_in_force",
    "is_autocast",
    "is_dense",
    "no_autocast",
    "way_in_force",
]

WAYS = ("in_weight", "separate")
_ALL = (*WAYS, "dense")  # the last one is slow, but can be differentiated twice


@dataclass
class _Forced:
    way: str | None = None
    gradient: str | None = None


_FORCED = _Forced()


@contextmanager
def forced(way: str | None = None, gradient: str | None = None) -> Iterator[None]:
    """Do all layers in one way, whatever it costs.

    All threads do, and what was compiled before is compiled again.

    Args:
        way: ``"in_weight"`` or ``"separate"``, for linear layers, or ``"dense"``: the
            deltas are added to copies of the parameters by ordinary operations, of
            which there are derivatives of any order. None for what fits the layer.
        gradient: One of the methods in `peft_ird.sparse.products`; None for the
            cheapest. What counts is the forward pass.

    Raises:
        ValueError: If there is no such way or method, or triton is not installed.
    """
    for name, given, known in (("way", way, _ALL), ("gradient", gradient, METHODS)):
        if given is not None and given not in known:
            raise ValueError(
                f"`{name}` must be one of {', '.join(known)} or None, got {given!r}."
            )
    if gradient == "triton" and not has_triton():
        raise ValueError(
            '`gradient="triton"` needs the package triton, which is not installed; it '
            "comes with torch's builds for CUDA."
        )
    before = _FORCED.way, _FORCED.gradient
    _FORCED.way, _FORCED.gradient = way, gradient
    try:
        yield
    finally:
        _FORCED.way, _FORCED.gradient = before


def way_in_force() -> str | None:
    """Return the way that is forced, if one is."""
    return _FORCED.way


def gradient_in_force(chosen: str) -> str:
    """Return the method that is forced, or else the one that was chosen."""
    return _FORCED.gradient or chosen


def is_dense() -> bool:
    """Return whether deltas have to be added to parameters by ordinary operations.

    So they have where functions are transformed, traced or differentiated forward.
    Custom operators allow none of it: forward mode would find silent zeros, and
    `torch.jit.trace` take their results for constants.
    """
    if _FORCED.way == "dense":
        return True
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return True
    is_in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return is_in_functorch or forward_ad._current_level >= 0


def no_autocast(kind: str) -> AbstractContextManager[Any]:
    """Switch autocast off for a type of device, where it is on."""
    return torch.autocast(kind, enabled=False) if is_autocast(kind) else nullcontext()


def is_autocast(kind: str) -> bool:
    """Return whether autocast is on for a type of device; some know none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
