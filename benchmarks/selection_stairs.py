"""Time whole selections against one Fisher pass, and several processes against one.

python benchmarks/selection_stairs.py                  # a few minutes
python benchmarks/selection_stairs.py --shapes tiny --repeats 1
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from bars import Row, rated, render
from processes import in_processes
from record import RESULTS, circumstances, keep_memory, write
from selection_speed import SHAPES, build, candidates, draw

from peft_ird import Calibration, IRDConfig, Selection, select_parameters
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed

SAMPLES = 128  # of the paper's first cell
LENGTHS = ("32", "64", "mixed")
BAR = 1.5
WORLD = (1, 2, 4)

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write to one file.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["minilm"])
    add("--lengths", nargs="+", default=LENGTHS)
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=RESULTS / "selection-stairs.json")
    options = parser.parse_args(argv)
    results = {
        **circumstances(options),
        "samples": SAMPLES,
        "stairs": [
            stairs(shape, length, options.repeats, options.seed)
            for shape in options.shapes
            for length in options.lengths
        ],
        "processes": processes(options.shapes[0], options.repeats, options.seed),
    }
    write(options.output, results)
    print(table(results))


def paper(seed: int) -> IRDConfig:
    """Return the paper's staircase, all seven cells."""
    return IRDConfig(task_type="SEQ_CLS", density=0.0002, schedule="paper", seed=seed)


def stairs(shape: str, length: str, repeats: int, seed: int) -> Record:
    """Time the whole selection and one Fisher pass over its samples, in turn."""
    model = build(shape, seed)
    samples = draw(model, length, SAMPLES, seed)
    pool = candidates(model, "all")

    def whole() -> None:
        select_parameters(model, paper(seed), Calibration(samples))

    def one_pass() -> None:
        with borrowed(model):
            estimator = FisherEstimator(model, pool, Calibration(samples))
            for _ in estimator.fisher(range(SAMPLES)):
                pass

    seconds = alternate({"whole": whole, "pass": one_pass}, repeats)
    ratios = [a / b for a, b in zip(seconds["whole"], seconds["pass"], strict=True)]
    print(f"{shape}, {length}: {median(ratios):.2f} passes", flush=True)
    return {
        "shape": shape,
        "length": length,
        "seconds": seconds,
        "ratio": median(ratios),
    }


def alternate(
    contestants: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of each contestant, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def processes(shape: str, repeats: int, seed: int) -> list[Record]:
    """Let 1, 2 and 4 processes of one thread select the same; compare what they do."""
    found = []
    for size in WORLD:
        by_rank = in_processes(size, work, shape, repeats, seed)
        found.append(
            {
                "processes": size,
                "seconds": max(each["seconds"] for each in by_rank),
                "digests": sorted({each["digest"] for each in by_rank}),
            }
        )
        print(f"{size} processes: {found[-1]['seconds']:.1f} s", flush=True)
    return found


def work(shape: str, repeats: int, seed: int) -> Record:
    """Select by the paper's staircase with one thread and return the median time."""
    torch.set_num_threads(1)
    model = build(shape, seed)
    samples = draw(model, "mixed", SAMPLES, seed)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        selection = select_parameters(model, paper(seed), Calibration(samples))
        seconds.append(time.perf_counter() - start)
    return {"seconds": median(seconds), "digest": digest(selection)}


def digest(selection: Selection) -> str:
    """Return a fingerprint of the indices and samples."""
    content = hashlib.sha256(repr(selection.samples).encode())
    for module, parameters in selection.indices.items():
        for name, indices in parameters.items():
            content.update(f"{module}.{name}".encode())
            content.update(indices.numpy().tobytes())
    return content.hexdigest()[:16]


def table(results: Record) -> str:
    """Lay the ratios out in markdown."""
    return render(rows(results), results["settings"]["shapes"], "")


def rows(results: Record) -> list[Row]:
    """Return what a staircase and what several processes come to.

    Args:
        results: What the result file holds.
    """
    found = []
    for length in dict.fromkeys(cell["length"] for cell in results["stairs"]):
        cells = [cell for cell in results["stairs"] if cell["length"] == length]
        ratios = {cell["shape"]: cell["ratio"] for cell in cells}
        tokens = "32 to 128" if length == "mixed" else length
        title = f"whole staircase, in Fisher passes, {tokens} tokens"
        found.append(rated(title, ratios, "{:.2f}", most=BAR))
    found += _process_rows(results)
    return found


def _process_rows(results: Record) -> Iterator[Row]:
    """Yield the time of several processes over that of one with all threads."""
    shape = results["settings"]["shapes"][0]
    alone = [
        median(cell["seconds"]["whole"])
        for cell in results["stairs"]
        if (cell["shape"], cell["length"]) == (shape, "mixed")
    ]
    first = results["processes"][0]
    for each in results["processes"] if alone else ():
        same = each["digests"] == first["digests"]
        indices = "identical indices" if same else "OTHER INDICES"
        count = each["processes"]
        many = "1 process" if count == 1 else f"{count} processes"
        title = f"staircase, {many} of one thread, over one of all threads, {indices}"
        yield rated(title, {shape: each["seconds"] / alone[0]}, "{:.2f}")


if __name__ == "__main__":
    keep_memory()
    main()
