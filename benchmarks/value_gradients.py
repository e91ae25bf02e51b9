"""Time the ways to the gradient of a delta's values over densities and masks.

python benchmarks/value_gradients.py                                # a minute
python benchmarks/value_gradients.py --device cuda --dtype bfloat16 \
    --sides 1024 4096 --tokens 4096
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import circumstances, now, result_file, write
from torch import Tensor
from trainees import lines_in_use

from peft_ird.sparse.costs import cheapest
from peft_ird.sparse.products import METHODS, available
from peft_ird.sparse.support import Support

MASKS = ("clustered", "random")
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write one file.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--densities", nargs="+", type=float, default=[0.0002, 0.001, 0.005, 0.025])
    add("--masks", nargs="+", choices=MASKS, default=MASKS)
    add("--sides", nargs="+", type=int, default=[768], help="of square weights")
    add("--tokens", type=int, default=1024)
    add("--repeats", type=int, default=5)
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="default: in results, by the device")
    options = parser.parse_args(argv)
    cells = [
        measure(side, mask, density, options)
        for side in options.sides
        for mask in options.masks
        for density in options.densities
    ]
    result = {
        **circumstances(options),
        "cells": cells,
    }
    write(result_file("value-gradients", options), result)


def measure(
    side: int, mask: str, density: float, options: argparse.Namespace
) -> Record:
    """Return the times of all methods on one mask, after checking that they agree."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(options.seed)
    indices = draw(mask, side, density, generator).to(device)
    support = Support.of(indices, torch.Size((side, side)), dtype)
    places = support.layout(indices).places
    left, right = (
        torch.randn(options.tokens, size, generator=generator).to(device, dtype)
        for size in support.block
    )
    names = available(device)
    found = {name: METHODS[name](left, right, places) for name in names}
    worst = max(float((found["block"] - each).abs().max()) for each in found.values())
    # Sums of products of unit variance have the root of their number as their size.
    if worst > 1e-3 * math.sqrt(options.tokens):
        raise RuntimeError(f"The methods differ by {worst:.2g}.")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            start = now(options.device)
            METHODS[name](left, right, places)
            seconds[name].append(now(options.device) - start)
    cell = {
        "side": side,
        "mask": mask,
        "density": density,
        "k": len(indices),
        "block": support.block,
        "chosen": cheapest(support.block, len(indices), device, dtype),
        "median_seconds": {name: median(times) for name, times in seconds.items()},
        "seconds": seconds,
    }
    print(describe(cell))
    return cell


def draw(mask: str, side: int, density: float, generator: torch.Generator) -> Tensor:
    """Return sorted flat positions; clustered ones as `trainees.clustered` draws."""
    k = max(1, round(density * side * side))
    rows = columns = torch.arange(side)
    if mask == "clustered":
        rows, columns = lines_in_use(side, side, k, density, generator)
    chosen = torch.randperm(len(rows) * len(columns), generator=generator)[:k]
    flat = rows[chosen // len(columns)] * side + columns[chosen % len(columns)]
    return flat.sort().values


def describe(cell: Record) -> str:
    """Return one line on a cell; what the cost model would choose has a star."""
    times = ", ".join(
        f"{name}{'*' if name == cell['chosen'] else ''} {1e3 * seconds:.3f} ms"
        for name, seconds in cell["median_seconds"].items()
    )
    height, width = cell["block"]
    return (
        f"{cell['side']}, {cell['mask']}, {100 * cell['density']:g} %, "
        f"block {height} x {width}: {times}"
    )


if __name__ == "__main__":
    main()
