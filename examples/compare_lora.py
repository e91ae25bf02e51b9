"""Set IRD and LoRA side by side: same budget, seeds, schedule and data, one table.

python examples/compare_lora.py --task mrpc --data-dir GLUE --seeds 0 1 2 3 4

LoRA's rank says how many entries both train. Each run has a process of its own, so that
peak memory can be compared. The learning rate of each method is the one of its grid
that scores best on held-out training samples with the first seed; the heads of both
learn at one rate.
"""

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import run_glue
from arguments import amount, json_object, positive
from glue_setup import Setup, finite
from methods import IRD_METHODS
from peft import PeftModel
from quickstart import in_fresh_process
from scipy import stats

Result = dict[str, Any]
SWITCHES = 9


def main(argv: Sequence[str] | None = None) -> Result:
    """Run both methods on all seeds; write and print the comparison.

    Args:
        argv: Arguments of the command line; None for those of this process.

    Returns:
        What ``comparison.json`` holds.
    """
    options, common = parse_arguments(argv)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lora = all_seeds("lora", options.lora_lrs, ["--rank", str(options.rank)], options)
    budget = lora[0]["entries"]
    chosen = ["--budget", str(budget), "--options", json.dumps(options.ird_options)]
    ird = all_seeds(options.ird_method, options.ird_lrs, chosen, options)
    comparison = {
        "options": {"common": common, **vars(options)},
        "difference": difference(ird, lora),
        "ird": ird,
        "lora": lora,
    }
    write(folder / "comparison.json", comparison)
    print(table(comparison))
    return comparison


def parse_arguments(argv: Sequence[str] | None) -> tuple[Namespace, list[str]]:
    """Return this script's options, and those that it passes on to `run_glue`."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Other options are those of run_glue.py, for both methods.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # else --seed is taken for --seeds
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rank", type=positive, default=2, help="of LoRA; it sets the budget of both")
    add("--ird-method", choices=IRD_METHODS, default="ird", help="of IRDConfig")
    add("--ird-options", type=json_object, help="further options of IRDConfig, as JSON",
        default={"scope": "per_module", "temperature": 4.0},
    )  # fmt: skip
    add("--ird-lrs", type=amount, nargs="+", default=[1e-2, 3e-2], help="to try")
    add("--lora-lrs", type=amount, nargs="+", default=[1e-3, 3e-3])
    add("--head-lr", type=amount, default=0.03, help="of both heads, as rates of their "
        "own can decide who is ahead; the default suits MiniLM")  # fmt: skip
    add("--output-dir", default="comparison-output")
    options, common = parser.parse_known_args(argv)
    # Complain now, not after the first trainings.
    taken = {"--budget", "--density", "--lr", "--method", "--options", "--seed"}
    if given := taken.intersection(part.partition("=")[0] for part in common):
        parser.error(f"{', '.join(sorted(given))}: set by this script")
    run_glue.check_options(parser, options.ird_method, options.ird_options)
    parsed = run_glue.parse_arguments(common)
    if parsed.held_out < 1:
        parser.error("--held-out must be at least 1: rates are chosen on these samples")
    options.common = common
    return options, common


def write(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    temporary.replace(path)


def all_seeds(
    method: str, rates: Sequence[float], arguments: Sequence[str], options: Namespace
) -> list[Result]:
    """Choose a method's rate by the first seed, and train with all of them.

    What is in the folder already is not trained again.
    """

    def run(rate: float, seed: int) -> Result:
        given = [*options.common, *arguments, "--method", method]
        given += ["--head-lr", str(options.head_lr)]
        given += ["--lr", str(rate), "--seed", str(seed)]
        digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:12]
        path = Path(options.output_dir, f"run-{digest}.json")
        if not path.exists():
            write(path, in_fresh_process(train, given))
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        print(f"{method}, rate {rate:g}, seed {seed}: {scores(result)}", flush=True)
        return result

    first, *others = options.seeds
    tried = [run(rate, first) for rate in rates]
    best = max(tried, key=lambda result: finite(scores(result)["held_out"]))
    return [best, *(run(best["rate"], seed) for seed in others)]


def train(arguments: Sequence[str]) -> Result:
    """Train once, and measure how long it takes to switch to another adapter."""
    options = run_glue.parse_arguments(arguments)
    options.save = True
    with tempfile.TemporaryDirectory() as temporary:
        options.output_dir = temporary
        folder = Path(temporary)
        result = run_glue.run(options, folder)
        result["switch_seconds"] = switch_seconds(options, folder / "adapter")
    return result


def switch_seconds(options: Namespace, adapter: Path) -> dict[str, float]:
    """Return the seconds to change between two adapters, active ones and merged ones.

    Args:
        options: Those of `run_glue`.
        adapter: A saved adapter; it is loaded twice.
    """
    base = Setup(options).load_model()
    model = PeftModel.from_pretrained(base, str(adapter), adapter_name="first")
    model.load_adapter(str(adapter), adapter_name="second")

    def merged(name: str) -> None:
        model.unmerge_adapter()
        model.set_adapter(name)
        model.merge_adapter([name])

    found = {"active": _median_seconds(model.set_adapter)}
    model.merge_adapter(["second"])
    return {**found, "merged": _median_seconds(merged)}


def _median_seconds(switch: Callable[[str], None]) -> float:
    seconds = []
    for i in range(SWITCHES):
        start = time.perf_counter()
        switch(("first", "second")[i % 2])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def scores(result: Result) -> dict[str, float]:
    """Return the ranking score of each split."""
    return {name: part["score"] for name, part in result["scores"].items()}


def reported(result: Result) -> float:
    """Return the mean score of the validation splits, in points."""
    parts = [v for name, v in scores(result).items() if name != "held_out"]
    return 100 * statistics.mean(parts)


def difference(ird: Sequence[Result], lora: Sequence[Result]) -> dict[str, float]:
    """Return IRD's score minus LoRA's, paired over seeds, with a 95 % interval.

    The interval is Student's; with few seeds it is wide, as it should be.
    """
    pairs = [reported(a) - reported(b) for a, b in zip(ird, lora, strict=True)]
    if len(pairs) < 2:
        return {"mean": pairs[0]}
    mean = statistics.mean(pairs)
    if len(set(pairs)) == 1:
        return {"mean": mean, "low": mean, "high": mean, "p": float(mean == 0)}
    test = stats.ttest_1samp(pairs, 0.0)
    low, high = test.confidence_interval(0.95)
    return {
        "mean": mean,
        "low": float(low),
        "high": float(high),
        "p": float(test.pvalue),
    }


ROWS: list[tuple[str, Callable[[Result], float], str]] = [
    ("trained entries", lambda r: r["entries"], ",.0f"),
    ("and in the head", lambda r: r["head_entries"], ",.0f"),
    ("learning rate", lambda r: r["rate"], "g"),
    ("that of the head", lambda r: r["head_rate"], "g"),
    ("seconds to select", lambda r: r["seconds"]["select"], ".1f"),
    ("seconds to train", lambda r: r["seconds"]["train"], ".1f"),
    ("peak host memory, MiB", lambda r: (r["peak_bytes"] or math.nan) / 2**20, ",.0f"),
    ("adapter file, KiB", lambda r: r["adapter_bytes"] / 2**10, ",.0f"),
    ("ms to switch on a CPU", lambda r: 1e3 * r["switch_seconds"]["active"], ".2f"),
    ("the same, merged", lambda r: 1e3 * r["switch_seconds"]["merged"], ".2f"),
]


def table(comparison: Result) -> str:
    """Lay out both methods beside each other: medians, and scores with their spread."""
    runs = (comparison["ird"], comparison["lora"])
    lines = [f"{'':<24}{'IRD':>16}{'LoRA':>16}"]
    metric = runs[0][0]["metric"].replace("_", " ")
    lines.append(f"{metric:<24}" + "".join(f"{_spread(run):>16}" for run in runs))
    for title, value, form in ROWS:
        cells = [format(statistics.median(map(value, run)), form) for run in runs]
        lines.append(f"{title:<24}" + "".join(f"{cell:>16}" for cell in cells))
    found = comparison["difference"]
    text = f"IRD - LoRA: {found['mean']:+.1f} points"
    if "low" in found:
        text += (
            f", 95 % interval {found['low']:+.1f} to {found['high']:+.1f}, "
            f"p = {found['p']:.3f}"
        )
    return "\n".join([*lines, "", f"{text}, {len(runs[0])} seeds"])


def _spread(runs: Sequence[Result]) -> str:
    values = [reported(run) for run in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
