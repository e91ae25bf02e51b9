"""Time the streamed top-k against `torch.topk` on the concatenation.

python benchmarks/topk.py               # 100 M scores: some minutes, 5 GB; Linux
python benchmarks/topk.py --layers 1    # a quick look
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import (
    RESULTS,
    git_state,
    giving_back,
    keep_memory,
    machine,
    status,
    versions,
    write,
)
from torch import Tensor

from peft_ird.selection.topk import TopK

HIDDEN = 768
EMBEDDINGS = (30522 * HIDDEN, 512 * HIDDEN)
LAYER = (*[HIDDEN**2, HIDDEN] * 4, *[4 * HIDDEN**2, 4 * HIDDEN, 4 * HIDDEN**2, HIDDEN])
DENSITIES = (0.001, 0.005, 0.025)
SPEED_BAR = 4.0
MEMORY_BAR = 1.0  # bytes per entry, at the largest density


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write one file.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=11, help="of the model")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--seed", type=int, default=0, help="of the scores")
    parser.add_argument("--output", type=Path, default=RESULTS / "topk.json")
    options = parser.parse_args(argv)
    memory = {
        density: {
            name: in_a_new_process(name, density, options.layers, options.seed)
            for name in CONTENDERS
        }
        for density in DENSITIES
    }
    parts = fisher_like(options.layers, options.seed)
    rows = []
    for density in DENSITIES:
        row = {"density": density, **compare(parts, density, options.repeats)}
        row["bytes_per_entry"] = memory[density]
        rows.append(row)
        print(describe(row))
    result = {
        "layers": options.layers,
        "seed": options.seed,
        "tensors": len(parts),
        "entries": count(parts),
        "threads": torch.get_num_threads(),
        "bars": {"ratio": SPEED_BAR, "bytes_per_entry": MEMORY_BAR},
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
        "git": git_state(),
    }
    write(options.output, result)


def fisher_like(layers: int, seed: int) -> list[Tensor]:
    """Draw squares whose scale differs by row and by tensor, of BERT's shapes."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, size in enumerate((*EMBEDDINGS, *LAYER * layers)):
        part = torch.randn(size, generator=generator).square_()
        rows = torch.randn(size // HIDDEN, 1, generator=generator).mul_(2).exp_()
        part.view(-1, HIDDEN).mul_(rows * 10 ** (-8 + 2 * (number % 7) / 7))
        parts.append(part)
    return parts


def concatenate(parts: list[Tensor], k: int) -> Tensor:
    """Return the sorted flat positions of the k largest, by `torch.topk`."""
    return torch.topk(torch.cat(parts), k, sorted=False).indices.sort().values


def stream(parts: list[Tensor], k: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the sorted positions of the k largest by part, with their scores."""
    best = TopK(k)
    for number, part in enumerate(parts):
        best.update(number, part)
    return best.finish()


CONTENDERS: dict[str, Callable[..., object]] = {
    "concatenate": concatenate,
    "stream": stream,
}


def compare(parts: list[Tensor], density: float, repeats: int) -> dict[str, Any]:
    """Time the contenders in turn, after checking that they choose the same."""
    k = round(density * count(parts))
    if not torch.equal(concatenate(parts, k), flat(stream(parts, k), parts)):
        raise RuntimeError("The choices differ; ties at the k-th score? Try a seed.")
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, contender in CONTENDERS.items():
            start = time.perf_counter()
            contender(parts, k)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(times) for name, times in seconds.items()}
    return {
        "k": k,
        "ratio": medians["concatenate"] / medians["stream"],
        "median_seconds": medians,
        "seconds": seconds,
    }


def flat(chosen: dict[int, tuple[Tensor, Tensor]], parts: list[Tensor]) -> Tensor:
    """Return the choices as positions in the concatenation."""
    starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return torch.cat([starts[part] + where for part, (where, _) in chosen.items()])


def extra_bytes(name: str, density: float, layers: int, seed: int) -> float:
    """Return how far the peak rises over the scores, per entry."""
    parts = fisher_like(layers, seed)
    contender = CONTENDERS[name]
    contender([torch.rand(100_000)], 1_000)  # loads code, starts threads
    for part in parts:
        part.sum()  # brings back what was swapped out
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
    before = status("VmRSS")
    contender(parts, round(density * count(parts)))
    return (status("VmHWM") - before) / count(parts)


def in_a_new_process(name: str, density: float, layers: int, seed: int) -> float:
    """Return the extra bytes where nothing else has run."""
    spawn = multiprocessing.get_context("spawn")
    with giving_back(), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(extra_bytes, name, density, layers, seed).result()


def count(parts: list[Tensor]) -> int:
    """Return the number of scores."""
    return sum(map(len, parts))


def describe(row: dict[str, Any]) -> str:
    """Return one line for the screen."""
    told = [
        f"{name} {row['median_seconds'][name]:.3f} s, "
        f"{row['bytes_per_entry'][name]:.2f} bytes per entry"
        for name in CONTENDERS
    ]
    return f"{row['density']:.1%}: {'; '.join(told)}; {row['ratio']:.1f} x"


if __name__ == "__main__":
    keep_memory()
    main()
