"""Randomness of one's own: seeded, and without a trace in the global state."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["own_randomness", "seeded_devices"]


def seeded_devices() -> list[int]:
    """Return the GPUs whose random state may change; none before the first is used."""
    is_used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return list(range(torch.cuda.device_count())) if is_used else []


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, Python and NumPy, and restore them afterwards.

    Data sets and collators draw from them, and calling a model may.

    Args:
        seed: The seed.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(seeded_devices()):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
