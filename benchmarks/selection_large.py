"""Select on models of a GPU's size: beside a plain pass, a loop, and in memory.

python benchmarks/selection_large.py --device cuda --dtype bfloat16
python benchmarks/selection_large.py --shapes tiny tiny-llama --samples 4 --length 16

Candidates are the linear layers of all blocks. A plain pass is forward and backward of
the same batches, with the gradients of the candidates added up.
"""

import argparse
import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bars import Row, rated, render
from record import circumstances, now, result_file, write
from shapes import SHAPES, build, draw, targets
from torch import nn

from peft_ird import Calibration, IRDConfig, select_parameters
from peft_ird.adapter.targets import find_candidates
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed, requiring_grad

DENSITY = 0.001
BAR = 1.10  # a Fisher pass, in plain passes
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write one file.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--shapes", nargs="+", choices=SHAPES, default=["bert-base", "gpt2", "llama-1b"]
    )
    add("--samples", type=int, default=32)
    add("--length", type=int, default=512, help="tokens of a sample")
    add("--repeats", type=int, default=3)
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="default: in results, by the device")
    options = parser.parse_args(argv)
    cells = [measure(name, options) for name in options.shapes]
    results = {
        **circumstances(options),
        "cells": cells,
    }
    write(result_file("selection-large", options), results)
    print(table(results))


def measure(name: str, options: argparse.Namespace) -> Record:
    """Return seconds and bytes on one shape."""
    shape = replace(SHAPES[name], batch=options.samples, length=options.length)
    model = build(shape, options.seed, options.device, options.dtype).eval()
    batch = {key: each.tolist() for key, each in draw(shape, options.seed).items()}
    rows = [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    names = "|".join(re.escape(module) for module in targets(model))
    config = IRDConfig(
        density=DENSITY, target_modules=f"({names})", num_samples=options.samples
    )
    found = {"shape": name, **passes(model, config, rows, options)}
    gc.collect()
    before = start_memory(options.device)
    start = now(options.device)
    selection = select_parameters(model, config, Calibration(rows))
    found |= {
        "selection_seconds": now(options.device) - start,
        "entries": len(selection),
        "stages": [list(stage) for stage in selection.stages],
        "selection_bytes": peak_memory(options.device) - before,
    }
    print({k: v for k, v in found.items() if k != "seconds"}, flush=True)
    return found


def passes(
    model: nn.Module, config: IRDConfig, rows: list[Record], options: argparse.Namespace
) -> Record:
    """Time a Fisher pass, a plain one and a loop over the same samples, in turn."""
    device = options.device
    pool = find_candidates(model, config)
    samples = range(len(rows))
    with borrowed(model):
        estimator = FisherEstimator(model, pool, Calibration(rows))
        start = now(device)
        groups = estimator.batches(samples)
        check = now(device) - start

        def inputs(group: Sequence[int]) -> Record:
            chosen = [rows[i] for i in group]
            return {
                key: torch.tensor([row[key] for row in chosen], device=device)
                for key in chosen[0]
            }

        def plain() -> None:
            with requiring_grad(pool.parameters):
                for group in groups:
                    model(**inputs(group)).loss.backward()
            for parameter in pool.parameters:
                parameter.grad = None

        def fisher() -> None:
            for _ in estimator.fisher(samples):
                pass

        def loop() -> None:
            sums = [torch.zeros_like(p, dtype=torch.float32) for p in pool.parameters]
            with requiring_grad(pool.parameters):
                for i in samples:
                    loss = model(**inputs([i])).loss
                    found = torch.autograd.grad(loss, pool.parameters)
                    for total, gradient in zip(sums, found, strict=True):
                        total.add_(gradient.float().square_())

        runs = {"fisher": fisher, "plain": plain, "loop": loop}
        seconds = in_turn(runs, options)
    ratios = {
        name: median(a / b for a, b in zip(seconds["fisher"], each, strict=True))
        for name, each in seconds.items()
    }
    return {
        "candidates": len(pool),
        "batches": [len(group) for group in groups],
        "check_seconds": check,
        "seconds": seconds,
        "over": {name: ratio for name, ratio in ratios.items() if name != "fisher"},
    }


def in_turn(
    runs: dict[str, Callable[[], None]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return the seconds of each, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(options.repeats + 1):
        for name, run in runs.items():
            gc.collect()
            start = now(options.device)
            run()
            if i:
                seconds[name].append(now(options.device) - start)
    return seconds


def start_memory(device: str) -> int:
    """Forget the peak so far, and return what is allocated; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: str) -> int:
    """Return the most that was allocated since; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0


def table(results: Record) -> str:
    """Render the cells, one column per shape; misses are bold.

    Args:
        results: The content of a result file.
    """
    cells = {cell["shape"]: cell for cell in results["cells"]}

    def row(
        title: str,
        value: Callable[[Record], float],
        form: str,
        most: float | None = None,
    ) -> Row:
        return rated(title, {k: value(cell) for k, cell in cells.items()}, form, most)

    rows = [
        row(
            "Fisher pass, in plain passes",
            lambda cell: cell["over"]["plain"],
            "{:.2f}",
            most=BAR,
        ),
        row(
            "times faster than a one-sample loop",
            lambda cell: 1 / cell["over"]["loop"],
            "{:.2f}",
        ),
        row("candidates", lambda cell: cell["candidates"], "{:,}"),
        row("entries selected", lambda cell: cell["entries"], "{:,}"),
        row("seconds to select", lambda cell: cell["selection_seconds"], "{:.1f}"),
        row(
            "peak beyond the model, GiB",
            lambda cell: cell["selection_bytes"] / 2**30,
            "{:.1f}",
        ),
    ]
    settings = results["settings"]
    versions = ", ".join(f"{n} {results['versions'][n]}" for n in ("torch", "peft"))
    where = results["machine"]["gpu"] or f"{results['threads']} threads"
    note = (
        f"{settings['samples']} samples of {settings['length']} tokens, random "
        f"weights, {settings['dtype']}, medians of {settings['repeats']} repetitions, "
        f"{where}, {versions}; the selection is IRD's, {DENSITY:.1%}, with the check "
        "of batches."
    )
    return render(rows, list(cells), note)


if __name__ == "__main__":
    main()
