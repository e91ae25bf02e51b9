"""Which way to the gradient of a delta's values is the cheapest, on this device.

Costs are per token and in multiples of one multiplication of a dense matrix product.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from peft_ird.sparse.products import METHODS, by_block, by_sampling

__all__ = ["Costs", "calibrated", "cheapest"]

# Blocks below this are computed faster than anything could be decided about them.
_SMALL = 1 << 14
_TOKENS, _SIDE, _EVERY = 512, 768, 50  # of the products that are timed
_REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """What the steps of a method cost.

    Args:
        sampled: An entry of a sampled product.
        moved: An element of a factor that is copied into another layout.
    """

    sampled: float
    moved: float

    def of(self, method: str, block: tuple[int, int], k: int) -> float:
        """Return the cost of a method.

        Args:
            method: One of `METHODS`.
            block: Rows and columns that have entries.
            k: Number of entries.
        """
        if method == "block":
            return block[0] * block[1]
        return self.sampled * k + self.moved * (block[0] + block[1])


def cheapest(
    block: tuple[int, int], k: int, device: torch.device, dtype: torch.dtype
) -> str:
    """Return the method with the lowest cost.

    Args:
        block: Rows and columns that have entries.
        k: Number of entries.
        device: Where the product is computed.
        dtype: Type that it is computed in.
    """
    if block[0] * block[1] <= _SMALL or device.type == "meta":
        return "block"
    costs = calibrated(device, dtype)
    return min(METHODS, key=lambda method: costs.of(method, block, k))


_TYPICAL = Costs(sampled=2.0, moved=16.0)  # on two cores with MKL


@cache
def calibrated(device: torch.device, dtype: torch.dtype) -> Costs:
    """Time the products once on a device.

    Times are noisy: what is far from typical is not believed, and costs are rounded.

    Args:
        device: The device.
        dtype: Type of the factors.
    """
    left, right = (
        torch.ones(_TOKENS, _SIDE, device=device, dtype=dtype) for _ in range(2)
    )
    area = _SIDE * _SIDE
    places = torch.arange(0, area, _EVERY, device=device)

    def timed(run: Callable[[], object]) -> float:
        return _seconds(run, device) / unit

    unit = 1.0
    unit = timed(lambda: by_block(left, right, places)) / area
    try:
        sampling = timed(lambda: by_sampling(left, right, places))
    except RuntimeError:  # the type has no sampled product on this device
        return Costs(math.inf, math.inf)
    moved = timed(lambda: left.t().contiguous()) / _SIDE
    sampled = (sampling - 2 * _SIDE * moved) / len(places)
    return Costs(_near(_TYPICAL.sampled, sampled), _near(_TYPICAL.moved, moved))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few times, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _near(typical: float, cost: float) -> float:
    """Return a cost as a power of two, and no more than eight times off what it is."""
    most = 3
    exponent = round(math.log2(max(cost, 1e-9) / typical))
    return typical * 2.0 ** max(-most, min(most, exponent))
