"""The default device, changed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["on_device"]


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Have tensors be made on a device where none is said.

    Args:
        device: The device.
    """
    if torch.get_default_device() == device:  # a context slows every call down
        yield
        return
    with device:
        yield
