"""Time the Fisher information against a plain pass, a loop and other libraries.

python benchmarks/selection_speed.py                       # all: a quarter of an hour
python benchmarks/selection_speed.py --shapes tiny --only plain engine
"""

import argparse
import gc
import multiprocessing
import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import CONTESTANTS, PEERS, Work, with_batches
from record import RESULTS, circumstances, giving_back, keep_memory, status, write
from speed_table import table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from peft_ird import IRDConfig
from peft_ird.adapter.targets import find_candidates
from peft_ird.selection.pool import Pool

SHAPES = {  # hidden size, layers, heads, intermediate size, vocabulary
    "tiny": (32, 2, 4, 64, 100),
    "minilm": (384, 6, 12, 1536, 30522),
    "bert-base": (768, 12, 12, 3072, 30522),
}
TOKENS = {"tiny": 512, "minilm": 4096, "bert-base": 2048}  # of all samples of a cell
LENGTHS = ("16", "32", "64", "128", "mixed")
LONGEST = 128  # of mixed lengths, which start at a quarter of it
SPEED = ("plain", "engine", "loop", "unpadded")  # the last for mixed lengths
PARTS = (*SPEED, *PEERS, "memory", "accuracy")
PEER_LENGTH = "64"
AGREEMENT = 1e-4  # a peer that is further from the loop computes something else

Record = dict[str, Any]
Row = tuple[str, dict[str, str], str]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for, print it and write it to one file.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["minilm", "bert-base"])
    add("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS)
    add("--repeats", type=int, default=3)
    add("--samples", type=int, help="of each cell; default: those of some tokens")
    add("--only", nargs="+", choices=PARTS, default=PARTS)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=RESULTS / "selection-speed.json")
    options = parser.parse_args(argv)
    results = {
        **circumstances(options),
        **measure(options),
    }
    write(options.output, results)
    print(table(results))


def measure(options: argparse.Namespace) -> Record:
    """Return the results of the parts that are asked for."""
    chosen = set(options.only)
    found: Record = {}
    if "memory" in chosen:
        found["memory"] = memory(options.shapes[-1], options.samples, options.seed)
    if "accuracy" in chosen:
        found["accuracy"] = accuracy(options.shapes[0], options.seed)
    if chosen & set(SPEED):
        found["speed"] = speed([name for name in SPEED if name in chosen], options)
    if chosen & set(PEERS):
        found["peers"] = against_peers([n for n in PEERS if n in chosen], options)
    return found


def build(shape: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a classifier with random weights, in eval mode."""
    hidden, layers, heads, intermediate, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def candidates(model: nn.Module, scope: str) -> Pool:
    """Return all parameters but the head's, or linear layers'; only they will train."""
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    targets = linear if scope == "linear" else None
    pool = find_candidates(
        model, IRDConfig(task_type="SEQ_CLS", density=0.1, target_modules=targets)
    )
    model.requires_grad_(False)
    for parameter in pool.parameters:
        parameter.requires_grad_(True)
    return pool


def draw(model: nn.Module, length: str, count: int, seed: int) -> list[Record]:
    """Return samples of random tokens without padding, and random labels."""
    rng = random.Random(seed)
    longest = LONGEST if length == "mixed" else int(length)
    shortest = longest // 4 if length == "mixed" else longest
    samples = []
    for _ in range(count):
        size = rng.randint(shortest, longest)
        ids = [rng.randrange(1, model.config.vocab_size) for _ in range(size)]
        mask = [1] * size
        samples.append(
            {"input_ids": ids, "attention_mask": mask, "labels": rng.randrange(2)}
        )
    return samples


def prepare(
    model: nn.Module, length: str, count: int, seed: int, scope: str = "all"
) -> Work:
    """Return the work of one cell."""
    samples = draw(model, length, count, seed)
    padded_to = LONGEST if length == "mixed" else int(length)
    work = Work(model, candidates(model, scope), samples, padded_to)
    return replace(work, groups=with_batches(work))


def default_count(shape: str, length: str) -> int:
    """Return how many samples have a shape's tokens; mixed ones count as 64 each."""
    return max(2, TOKENS[shape] // (64 if length == "mixed" else int(length)))


def speed(names: Sequence[str], options: argparse.Namespace) -> list[Record]:
    """Time the plain pass, the engine and the loop on all cells."""
    cells = []
    for shape in options.shapes:
        for length in options.lengths:
            place = {"shape": shape, "length": length, "scope": "all"}
            count = options.samples or default_count(shape, length)
            some = [n for n in names if n != "unpadded" or length == "mixed"]
            cells.append(cell(some, place, count, options.repeats, options.seed))
    return cells


def cell(
    names: Sequence[str], place: dict[str, str], count: int, repeats: int, seed: int
) -> Record:
    """Time contestants on the same samples, after a repetition that does not count.

    Args:
        names: The contestants.
        place: The cell's shape, length and scope.
        count: Number of samples.
        repeats: Number of repetitions.
        seed: Seed of weights and samples.
    """
    model = build(place["shape"], seed)
    work = prepare(model, place["length"], count, seed, place["scope"])
    interleave(names, work, 1)
    timed = interleave(names, work, repeats)
    medians = ", ".join(f"{n} {each:.2f} s" for n, each in timed["median"].items())
    print(f"{', '.join(place.values())}: {medians}", flush=True)
    return {
        **place,
        "samples": count,
        "tokens": sum(len(sample["input_ids"]) for sample in work.samples),
        "batches": [len(group) for group in work.groups],
        "candidates": len(work.pool),
        **timed,
    }


def interleave(names: Sequence[str], work: Work, repeats: int) -> Record:
    """Return all seconds, their medians, and medians of the ratios to the engine's.

    Each repetition starts with another contestant; ratios are of one repetition. What
    the engine does once for several passes is timed apart, as ``check``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    checks = []
    for i in range(repeats):
        shift = i % len(names)
        for name in [*names[shift:], *names[:shift]]:
            before, pass_seconds = time_once(name, work)
            seconds[name].append(pass_seconds)
            if name == "engine":
                checks.append(before)
    ours = seconds.get("engine", ())
    return {
        "seconds": seconds,
        "check": checks,
        "median": {name: median(each) for name, each in seconds.items()},
        "over_engine": {
            name: median(a / b for a, b in zip(each, ours, strict=True))
            for name, each in seconds.items()
            if ours and name != "engine"
        },
    }


def time_once(name: str, work: Work) -> tuple[float, float]:
    """Return a contestant's seconds before its pass, and those of the pass."""
    gc.collect()
    start = time.perf_counter()
    with CONTESTANTS[name](work) as run:
        ready = time.perf_counter()
        deque(run(), maxlen=0)
        end = time.perf_counter()
    return ready - start, end - ready


def against_peers(names: Sequence[str], options: argparse.Namespace) -> Record:
    """Check the peers, then time those that compute the same against the engine."""
    length = PEER_LENGTH if PEER_LENGTH in options.lengths else options.lengths[0]
    checks = {name: check_peer(name, options.seed) for name in names}
    cells = []
    for shape in options.shapes:
        count = options.samples or max(2, default_count(shape, length) // 2)
        for scope in ("all", "linear"):
            sound = [n for n in names if checks[n].get(scope, {}).get("agrees")]
            if sound:
                place = {"shape": shape, "length": length, "scope": scope}
                both = ["engine", *sound]
                cells.append(cell(both, place, count, options.repeats, options.seed))
    return {"checks": checks, "cells": cells}


def check_peer(name: str, seed: int) -> Record:
    """Compare a peer with the loop on a tiny model and samples of mixed lengths."""
    peer = PEERS[name]
    found: Record = {"note": peer.note}
    for scope in peer.scopes:
        try:
            found["version"] = version(peer.package)
            work = prepare(build("tiny", seed), "mixed", 6, seed, scope)
            apart = difference(result(name, work), result("loop", work), work.pool)
            found[scope] = {**apart, "agrees": apart["of_max"] <= AGREEMENT}
        except Exception as error:  # whatever another library raises is a finding
            found[scope] = {"error": f"{type(error).__name__}: {error}"}
    return found


def result(name: str, work: Work) -> list[Tensor]:
    """Return a contestant's Fisher information, one tensor per parameter."""
    with CONTESTANTS[name](work) as run:
        return [part.flatten().double() for part in run()]


def memory(shape: str, samples: int | None, seed: int) -> Record:
    """Compare the peaks of the engine and of a plain pass, each in a new process.

    There are two batches: over one, sums could grow while activations are let go.
    """
    count = samples or 2 * default_count(shape, "64")
    groups = prepare(build(shape, seed), "64", count, seed).groups
    found: Record = {"shape": shape, "length": "64", "samples": count}
    for name in ("plain", "engine", "limited"):
        fresh = multiprocessing.get_context("spawn")
        with giving_back(), ProcessPoolExecutor(1, mp_context=fresh) as process:
            arguments = (name, shape, count, seed, groups)
            found[name] = process.submit(peak, *arguments).result()
    size = found["candidates"] = found["engine"]["candidates"]
    for name in ("engine", "limited"):
        beyond = found[name]["peak"] - found["plain"]["peak"]
        found[name]["beyond_plain"] = beyond / (4 * size)
    found["limited_over_plain"] = (
        found["limited"]["seconds"] / found["plain"]["seconds"]
    )
    return found


def peak(
    name: str, shape: str, count: int, seed: int, groups: tuple[tuple[int, ...], ...]
) -> Record:
    """Return the bytes of this process before a pass and at its peak, on Linux."""
    model = build(shape, seed)
    pool = candidates(model, "all")
    work = Work(model, pool, draw(model, "64", count, seed), 64, groups)
    before = status("VmRSS")
    _, seconds = time_once(name, work)
    return {
        "before": before,
        "peak": status("VmHWM"),
        "candidates": len(pool),
        "seconds": seconds,
    }


def accuracy(shape: str, seed: int) -> Record:
    """Compare the engine and a float32 loop with the loop in float64."""
    work = prepare(build(shape, seed, torch.float64), "mixed", 4, seed)
    exact = result("loop", replace(work, padded_to=0))
    double = difference(result("engine", work), exact, work.pool)
    work = prepare(build(shape, seed), "mixed", 4, seed)
    return {
        "shape": shape,
        "length": "mixed",
        "samples": 4,
        "float64": double,
        "float32": difference(result("engine", work), exact, work.pool),
        "float32 loop": difference(result("loop", work), exact, work.pool),
    }


def difference(
    found: Sequence[Tensor], exact: Sequence[Tensor], pool: Pool
) -> dict[str, float]:
    """Return relative errors of all but key biases, whose gradient is zero.

    ``of_max`` is relative to the largest entry of all, ``of_own_max`` to that of each
    parameter, ``entrywise`` to each entry above 1e-6 of its parameter's largest.
    """
    largest = largest_error = of_own_max = entrywise = 0.0
    for name, ours, truth in zip(pool.names, found, exact, strict=True):
        if name[0].endswith(".key") and name[1] == "bias":
            continue
        error = (ours - truth).abs_()
        own, own_error = float(truth.max()), float(error.max())
        largest, largest_error = max(largest, own), max(largest_error, own_error)
        of_own_max = max(of_own_max, own_error / own)
        seen = truth > 1e-6 * own
        entrywise = max(entrywise, float((error[seen] / truth[seen]).max()))
    return {
        "of_max": largest_error / largest,
        "of_own_max": of_own_max,
        "entrywise": entrywise,
    }


if __name__ == "__main__":
    keep_memory()
    main()
