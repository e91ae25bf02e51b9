"""Which way to the gradient of a delta's values is the cheapest, on this device.

Costs are per token and in multiples of one multiplication of a dense matrix product.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from peft_ird.sparse.products import METHODS, available, turned
from peft_ird.sparse.ways import no_autocast

__all__ = ["Costs", "calibrated", "cheapest"]

# Blocks below this are computed faster than anything could be decided about them; on a
# GPU the fewer kernels of a product count, too.
_SMALL = {"cpu": 1 << 14, "cuda": 1 << 23}
# Tokens and side of the products that are timed. A GPU would be through with smaller
# ones before the next is launched.
_TIMED = {"cpu": (512, 768), "cuda": (4096, 2048)}
_EVERY = 50  # of their entries is asked for
_REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """What the steps of a method cost.

    Args:
        sampled: An entry of a sampled product.
        moved: An element of a factor that is copied into another layout.
        triton: An entry of the Triton kernel; infinite where it does not run.
    """

    sampled: float
    moved: float
    triton: float = math.inf

    def of(self, method: str, block: tuple[int, int], k: int) -> float:
        """Return the cost of a method.

        Args:
            method: One of `METHODS`.
            block: Rows and columns that have entries.
            k: Number of entries.
        """
        if method == "block":
            return block[0] * block[1]
        entry = self.triton if method == "triton" else self.sampled
        return entry * k + self.moved * (block[0] + block[1])


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
    small = _SMALL.get(device.type, _SMALL["cpu"])
    if block[0] * block[1] <= small or device.type == "meta":
        return "block"
    costs = calibrated(device, dtype)
    return min(METHODS, key=lambda method: costs.of(method, block, k))


_TYPICAL = Costs(sampled=8.0, moved=16.0)  # on two cores with MKL


@cache
def calibrated(device: torch.device, dtype: torch.dtype) -> Costs:
    """Time the products once on a device.

    Times are rounded. Those of a CPU are noisy: what is far from typical is not
    believed.

    Args:
        device: The device.
        dtype: Type of the factors.
    """
    with no_autocast(device.type):  # as where the products are needed
        return _timed(device, dtype)


def _timed(device: torch.device, dtype: torch.dtype) -> Costs:
    tokens, side = _TIMED.get(device.type, _TIMED["cpu"])
    left, right = (
        torch.ones(tokens, side, device=device, dtype=dtype) for _ in range(2)
    )
    places = torch.arange(0, side * side, _EVERY, device=device)

    def timed(method: str) -> float:
        return _seconds(lambda: METHODS[method](left, right, places), device)

    unit = timed("block") / side**2
    moved = _seconds(lambda: deque(turned(left), 0), device) / unit / side

    def entry(method: str) -> float:
        try:
            return (timed(method) / unit - 2 * side * moved) / len(places)
        except Exception:  # not for this type, or not to be compiled on this machine
            return math.inf

    sampled = entry("sampled")
    if device.type != "cuda":
        return Costs(_near(_TYPICAL.sampled, sampled), _near(_TYPICAL.moved, moved))
    triton = entry("triton") if "triton" in available(device) else math.inf
    return Costs(_rounded(sampled), _rounded(moved), _rounded(triton))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few times, after one that does not count.

    On a GPU each is of several runs: one alone would be over before the next is there.
    """
    runs = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        for _ in range(runs):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / runs)
    return min(times[1:])


def _near(typical: float, cost: float) -> float:
    """Return a cost rounded, and no more than eight times off what it is; or none."""
    most = 8
    near = max(typical / most, min(typical * most, _rounded(cost)))
    return math.inf if math.isinf(cost) else near


def _rounded(cost: float) -> float:
    """Return a power of two."""
    return cost if math.isinf(cost) else 2.0 ** round(math.log2(max(cost, 1e-9)))
