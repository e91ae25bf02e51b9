"""A weight that has a delta in it for a moment."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["with_delta"]

# Threads that use one weight wait for each other; a weight finds its lock by address.
_LOCKS = tuple(threading.Lock() for _ in range(64))
_ALIGNMENT = 64


@contextmanager
def with_delta(weight: Tensor, indices: Tensor, values: Tensor) -> Iterator[Tensor]:
    """Write a delta into a weight; every bit is put back, whatever happens inside.

    Memory that other processes see is left alone: they get no lock. There, and where
    flat positions are not those in memory, a copy has the delta.

    Args:
        weight: The weight; autograd does not notice what is done to it.
        indices: Distinct flat positions. Shape ``[k]``, integer.
        values: What is added there. Shape ``[k]``, floating point.

    Yields:
        The weight with the delta, for use inside only.
    """
    lent, places = weight.data, indices.long()
    if not lent.is_contiguous() or (lent.device.type == "cpu" and lent.is_shared()):
        lent = lent.contiguous() if not lent.is_contiguous() else lent.clone()
        lent.view(-1)[places] += values.detach().to(lent.dtype)
        yield lent
        return
    flat = lent.view(-1)
    with _LOCKS[lent.data_ptr() // _ALIGNMENT % len(_LOCKS)]:
        kept = flat[places]
        try:
            flat[places] = kept + values.detach().to(lent.dtype)
            yield lent
        finally:
            flat[places] = kept
