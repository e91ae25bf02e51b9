"""A weight that has a delta in it for a moment."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peft_ird.sparse.products import HALVES

__all__ = ["unlent", "with_delta"]

# Threads that use one weight wait for each other; a weight finds its lock by address.
# Large tensors start at one place in their pages, which a prime number spreads.
_LOCKS = tuple(threading.Lock() for _ in range(61))
_ALIGNMENT = 64
# weight -> its address, and whether memory that is not torch's own is private there
_PRIVATE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def with_delta(
    weight: Tensor,
    indices: Tensor,
    values: Tensor,
    compute: Callable[[Tensor], Tensor],
    other: Tensor | None = None,
) -> Tensor:
    """Compute with a delta in a weight; every bit is put back, whatever happens inside.

    Memory that other processes see, or that cannot be written to, is left alone: they
    get no lock. There, where flat positions are not those in memory, where torch
    forbids to write (to what was made in inference mode, outside it), and where the
    other factor lies in the same memory, a copy has the delta.

    Args:
        weight: The weight; autograd does not notice what is done to it.
        indices: Distinct flat positions. Shape ``[k]``, integer.
        values: What is added there. Shape ``[k]``, floating point.
        compute: Gets the weight with the delta, for use inside only.
        other: What it is computed with.

    Returns:
        What ``compute`` does.
    """
    lent, added = weight.data, values.detach().to(weight.dtype)
    is_own = other is None or not _is_beside(lent, other)
    if not (is_own and _is_lendable(lent) and _is_private(weight)):
        lent = lent.clone(memory_format=torch.contiguous_format)
        lent.view(-1).index_add_(0, indices, added)
        return compute(lent)
    flat, where = lent.view(-1), indices.long()
    with _lock(lent):
        kept = flat.index_select(0, where)
        try:
            flat.index_add_(0, where, added)
            return compute(lent)
        finally:  # by one thread: to wake the others takes longer
            flat.scatter_(0, where, kept)


def unlent(weight: Tensor) -> AbstractContextManager[Any]:
    """Keep deltas of other threads out of a weight.

    Weights in 16 bits have none, unless that way is forced on all threads.

    Args:
        weight: The weight, for reading.
    """
    return nullcontext() if weight.dtype in HALVES else _lock(weight)


def _is_lendable(weight: Tensor) -> bool:
    is_seen = weight.device.type == "cpu" and weight.untyped_storage().is_shared()
    is_locked = weight.is_inference() and not torch.is_inference_mode_enabled()
    return weight.is_contiguous() and not is_seen and not is_locked


def _is_beside(weight: Tensor, other: Tensor) -> bool:
    storages = weight.untyped_storage(), other.untyped_storage()
    return storages[0].data_ptr() == storages[1].data_ptr()


def _is_private(weight: Tensor) -> bool:
    """Return whether a weight lies in memory of this process, to be written to."""
    if weight.device.type != "cpu" or weight.untyped_storage().resizable():
        return True  # torch's own
    address = weight.data_ptr()
    known: tuple[int, bool] | None = _PRIVATE.get(weight)
    if known is None or known[0] != address:
        known = _PRIVATE[weight] = address, _is_mapped_privately(address)
    return known[1]


def _is_mapped_privately(address: int) -> bool:
    """Look an address up in the memory map; without one nothing is known of it."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return True
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        span, permissions, *_ = line.split()
        first, _, last = span.partition("-")
        if int(first, 16) <= address < int(last, 16):
            return permissions.startswith("rw") and permissions.endswith("p")
    return True


def _lock(weight: Tensor) -> threading.Lock:
    return _LOCKS[weight.data_ptr() // _ALIGNMENT % len(_LOCKS)]
