"""Measure training steps: time, memory, switching adapters, and how they grow.

python benchmarks/step.py                       # all: a quarter of an hour
python benchmarks/step.py --shapes tiny --parts speed --only floor ird lora-8
python benchmarks/step.py --device cuda --dtype bfloat16 --shapes llama-1b
"""

import argparse
import copy
import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from footprint import kept_bytes, peaks, state_bytes
from peft import LoraConfig, get_peft_model
from record import circumstances, giving_back, keep_memory, result_file, write
from shapes import SHAPES, Batch, Shape, build, draw, targets
from step_table import table
from torch import nn
from trainees import BUILDERS, Trainee, clustered, optimizer_of, trainees

from peft_ird import IRDConfig

PARTS = ("speed", "peak", "switch", "growth")
PEAKS = ("floor", "ird", "lora-8", "shira", "supertuning", "full")
WRITING = ("full", "bitfit")  # those who train the base weights themselves
GROWING = ("floor", "ird", "ird-random", "lora-8")
AXES: dict[str, Sequence[float]] = {
    "density": (0.0002, 0.001, 0.005, 0.025),
    "length": (16, 64, 256),
    "width": (256, 512, 768),
    "depth": (2, 4, 8),
}
BASE = Shape("bert", 512, 4, 8, 2048, 1000, batch=8, length=64)
TINY_BASE = replace(SHAPES["tiny"], length=64)
Record = dict[str, Any]


@dataclass
class Runner:
    """A contestant that is ready to step."""

    model: nn.Module
    batch: Batch
    optimizer: torch.optim.Optimizer | None

    def step(self) -> tuple[float, float]:
        """Return the seconds of a step, and of its passes without the optimizer."""
        start = _now()
        self.model(**self.batch).loss.backward()
        middle = _now()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return _now() - start, middle - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for, print it and write it to one file.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["bert-base", "gpt2", "llama"])
    add("--only", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    add("--densities", nargs="+", type=float, default=[0.005])
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--repeats", type=int, default=7)
    add("--batch", type=int, help="samples; default: the shape's own")
    add("--length", type=int, help="tokens of a sample; default: the shape's own")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="default: in results, by the device")
    options = parser.parse_args(argv)
    results = {
        **circumstances(options),
        **measure(options),
    }
    write(result_file("step", options), results)
    print(table(results))


def measure(options: argparse.Namespace) -> Record:
    """Return the results of the parts that are asked for."""
    found: Record = {}
    first = options.shapes[0]
    everyone = trainees(options.only, options.densities, options.seed)
    if "peak" in options.parts:  # first, as other models are in memory later
        chosen = [each for each in everyone if each.name in PEAKS]
        found["peak"] = {"shape": first, **peak(chosen, first, options)}
    if "speed" in options.parts:
        found["speed"] = [
            {"shape": name, **compare(everyone, sized(name, options), options)}
            for name in options.shapes
        ]
    if "switch" in options.parts:
        found["switch"] = {"shape": first, **switch(first, options)}
    if "growth" in options.parts:
        found["growth"] = growth(options)
    return found


def sized(name: str, options: argparse.Namespace) -> Shape:
    """Return a shape with the batch that is asked for."""
    shape = SHAPES[name]
    return replace(
        shape,
        batch=options.batch or shape.batch,
        length=options.length or shape.length,
    )


def peak(everyone: list[Trainee], name: str, options: argparse.Namespace) -> Record:
    """Return peaks by label; whoever fails has none."""
    found: Record = {}
    for each in everyone:
        try:
            shape = sized(name, options)
            with giving_back():
                found[each.label] = peaks(each, shape, options.device, options.dtype)
        except Exception as error:  # what a peer raises is a finding
            found[each.label] = {"error": f"{type(error).__name__}: {error}"}
    return {"trainees": found}


def compare(
    everyone: list[Trainee], shape: Shape, options: argparse.Namespace
) -> Record:
    """Time steps in turn and count what is kept, after some as a warm-up."""
    gc.collect()  # the models of the shape before
    runners: dict[str, Runner] = {}
    rows: dict[str, Record] = {}
    base = build(shape, options.seed, options.device, options.dtype)
    for each in everyone:
        row = rows[each.label] = {"name": each.name, "density": each.density}
        try:
            own = copied(base, share=each.name not in WRITING)
            runners[each.label], more = prepare(each, own, shape, options)
            row |= more
        except Exception as error:  # what a peer raises is a finding
            row["error"] = f"{type(error).__name__}: {error}"
            print(f"{each.label}: {row['error']}", flush=True)
    interleave(runners, rows, options.repeats, options.seed)
    for label in runners:
        print(
            f"{shape.family}, {label}: {median(rows[label]['step']):.3f} s", flush=True
        )
    return {"batch": shape.batch, "length": shape.length, "trainees": rows}


def copied(model: nn.Module, share: bool) -> nn.Module:
    """Return a copy of a frozen model, with or without weights of its own."""
    memo = {id(p): p for p in model.parameters()} if share else {}
    return copy.deepcopy(model, memo)


def prepare(
    each: Trainee, model: nn.Module, shape: Shape, options: argparse.Namespace
) -> tuple[Runner, Record]:
    """Build a contestant, take one step, and return its sizes beside it."""
    model, batch = each.build(model), draw(shape, options.seed, options.device)
    runner = Runner(model, batch, optimizer_of(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found: Record = {"trained": trained}
    found["kept"] = kept_bytes(model, batch)
    runner.step()
    if each.name.startswith("ird") and runner.optimizer:
        model(**batch).loss.backward()
        found["state_bytes"] = state_bytes(model, runner.optimizer)
        runner.optimizer.zero_grad()
    return runner, found


def interleave(
    runners: dict[str, Runner], rows: dict[str, Record], repeats: int, seed: int
) -> None:
    """Add seconds and medians of ratios; each repetition has an order of its own.

    A repetition that does not count comes first. ``over`` holds the ratios to all
    others, of one repetition each.
    """
    names = list(runners)
    rng = random.Random(seed)
    for label in names:
        rows[label] |= {"step": [], "passes": []}
    gc.collect()
    gc.freeze()  # what lives through all steps; each collection is then a short one
    for repetition in range(repeats + 1):
        for label in rng.sample(names, len(names)):
            gc.collect()
            whole, passes = runners[label].step()
            if repetition:
                rows[label]["step"].append(whole)
                rows[label]["passes"].append(passes)
    gc.unfreeze()
    for label in names:
        rows[label]["over"] = {
            other: {
                k: _ratio(rows[label][k], rows[other][k]) for k in ("step", "passes")
            }
            for other in names
        }


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    return median(a / b for a, b in zip(mine, theirs, strict=True))


def growth(options: argparse.Namespace) -> list[Record]:
    """Vary one size of a base point at a time."""
    base = TINY_BASE if options.shapes[0].startswith("tiny") else BASE
    names = [name for name in GROWING if name in options.only]
    found = []
    for axis, values in AXES.items():
        for value in values:
            shape, density = base, 0.005
            if axis == "density":
                density = value
            elif axis == "width":
                size = int(value) * base.width // BASE.width
                shape = replace(base, width=size, inner=4 * size)
            else:
                shape = replace(base, **{axis: int(value)})
            everyone = trainees(names, [density], options.seed)
            cell = compare(everyone, shape, options)
            found.append({"axis": axis, "value": value, **cell})
    return found


def switch(name: str, options: argparse.Namespace) -> Record:
    """Time switching between two adapters, as they are and merged."""
    shape = sized(name, options)
    density = options.densities[-1]
    base = build(shape, options.seed, options.device, options.dtype)
    names = [*targets(base)]
    is_transposed = shape.family == "gpt2"

    def ird_config(seed: int) -> IRDConfig:
        return IRDConfig(selection=clustered(base, density, seed))

    def lora_config(_: int) -> LoraConfig:
        return LoraConfig(r=8, target_modules=names, fan_in_fan_out=is_transposed)

    found: Record = {"density": density}
    kinds: dict[str, Callable[[int], Any]] = {"ird": ird_config, "lora-8": lora_config}
    for kind, config in kinds.items():
        own = build(shape, options.seed, options.device, options.dtype)
        model = get_peft_model(own, config(0), adapter_name="first")
        model.add_adapter("second", config(1))
        found[kind] = {
            "active": _seconds(model, options.repeats, merged=False),
            "merged": _seconds(model, options.repeats, merged=True),
        }
    merged, active = found["lora-8"]["merged"], found["lora-8"]["active"]
    found["times_faster"] = _ratio(merged, found["ird"]["merged"])
    found["times_faster_active"] = _ratio(active, found["ird"]["active"])
    return found


def _seconds(model: Any, repeats: int, merged: bool) -> list[float]:
    """Return the seconds of each switch, after two that are not counted."""
    if merged:
        model.merge_adapter()
    seconds = []
    for i in range(repeats + 2):
        start = _now()
        if merged:
            model.unmerge_adapter()
        model.set_adapter(("second", "first")[i % 2])
        if merged:
            model.merge_adapter()
        seconds.append(_now() - start)
    if merged:
        model.unmerge_adapter()
    return seconds[2:]


if __name__ == "__main__":
    keep_memory()
    main()
