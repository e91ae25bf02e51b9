"""Measure what options of the selection are worth, by training on real data.

python benchmarks/option_study.py --data-dir GLUE        # goes on where it stopped

Every run selects, trains and scores once. Learning rates are chosen by variant and task
on held-out training sentences; GLUE's validation set is what is reported.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from peft import get_peft_model
from record import RESULTS, ROOT, git_state, machine, versions, write
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from peft_ird import Calibration, IRDConfig, Selection, select_parameters

sys.path.insert(0, str(ROOT / "examples"))
from quickstart import packaged_minilm
from tasks import Task, load_tokenizer

BASE = {"density": 0.001, "num_samples": 128, "target_modules": "all-linear"}
WARM = {"head_warmup_steps": 100}
VARIANTS: dict[str, dict[str, Any]] = {
    "IRD": {},
    "IRD, warm head": WARM,
    "IRD, `per_module`": {"scope": "per_module"},
    "IRD, `balanced`": {"scope": "balanced"},
    "IRD, warm head, `per_module`": {**WARM, "scope": "per_module"},
    "IRD, scores by loss": {"sample_scaling": "loss"},
    "IRD, scores by length": {"sample_scaling": "length"},
    "IRD, 5 % trimmed": {"trim_samples": 0.05},
    "IRD, best 128 of 1000": {"num_ranked_samples": 1000},
    "FISH": {"method": "fish"},
    "FISH, warm head, `per_module`": {"method": "fish", **WARM, "scope": "per_module"},
    "random": {"method": "random"},
}
RATES = (5e-3, 2e-3)
RANDOM_RATES = (2e-2, 8e-3)
HELD_OUT, REPORTED = 500, 800
Run = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the result file yet, one run after the other.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with TASK/train.parquet and so on")
    add("--tasks", nargs="+", default=["sst2"])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--train", type=int, default=1000, help="training sentences")
    add("--epochs", type=int, default=3)
    add("--minutes", type=float, default=60.0, help="no run starts after that")
    add("--output", type=Path, default=RESULTS / "option-study.json")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    end = time.monotonic() + 60 * options.minutes
    results = load(options)
    done = {key(run) for run in results["runs"]}
    for wanted in plan(options):
        if key(wanted) not in done and time.monotonic() < end:
            results["runs"].append({**wanted, **train(wanted, options)})
            write(options.output, results)
            print({k: v for k, v in results["runs"][-1].items() if k != "kinds"})
    print(table(results))


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far, or new ones."""
    if options.output.exists():
        return json.loads(options.output.read_text(encoding="utf-8"))
    return {
        "settings": {"train": options.train, "epochs": options.epochs, **BASE},
        "versions": versions(),
        "machine": machine(),
        "git": git_state(),
        "runs": [],
    }


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs in an order that leaves every variant equally far."""
    for step, seed, task in itertools.product((0, 1), options.seeds, options.tasks):
        for variant in options.variants:
            rates = RANDOM_RATES if variant == "random" else RATES
            yield {
                "task": task,
                "variant": variant,
                "rate": rates[step],
                "seed": seed,
            }


def key(run: Run) -> tuple[Any, ...]:
    """Return what makes a run the same as another."""
    return run["task"], run["variant"], run["rate"], run["seed"]


def train(run: Run, options: argparse.Namespace) -> Run:
    """Select, train and score once."""
    torch.manual_seed(run["seed"])
    tokenizer = load_tokenizer(packaged_minilm())
    task = Task.from_parquet(
        Path(options.data_dir, run["task"]), options.train + HELD_OUT, REPORTED
    )
    rows = task.tokens("train", tokenizer)
    train_rows = rows.select(range(len(rows) - HELD_OUT))
    held_out = rows.select(range(len(rows) - HELD_OUT, len(rows)))
    collate = DataCollatorWithPadding(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(
        packaged_minilm(), num_labels=task.num_labels
    )
    config = IRDConfig(
        task_type="SEQ_CLS",
        seed=run["seed"],
        **{**BASE, **VARIANTS[run["variant"]]},
    )
    start = time.perf_counter()
    calibration = Calibration(train_rows, collate)
    selection = select_parameters(model, config, calibration)
    seconds = time.perf_counter() - start
    config.selection = selection
    model = get_peft_model(model, config)
    fit(model, train_rows, collate, run, options.epochs)
    return {
        "held_out": score(model, held_out, collate, task),
        "score": score(model, task.tokens("evaluation", tokenizer), collate, task),
        "metric": task.metric,
        "selection_seconds": seconds,
        "pooler": pooler_share(selection),
        "kinds": {k: place.share for k, place in selection.places("kind").items()},
    }


def fit(
    model: nn.Module, rows: Any, collate: Any, run: Run, epochs: int, size: int = 32
) -> None:
    """Train with AdamW and a rate that falls to zero; sentences sorted into batches."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run["rate"], weight_decay=0.0)
    generator = torch.Generator().manual_seed(run["seed"])
    steps = epochs * (len(rows) // size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    samples = list(rows)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            batch = collate([samples[i] for i in order[start : start + size]])
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def score(model: nn.Module, rows: Any, collate: Any, task: Task) -> float:
    """Return the task's metric."""
    model.eval()
    samples = sorted(rows, key=lambda sample: len(sample["input_ids"]))
    logits: list[Tensor] = []
    for start in range(0, len(samples), 64):
        logits.append(model(**collate(samples[start : start + 64])).logits)
    labels = torch.tensor([sample["label"] for sample in samples]).numpy()
    found = torch.cat(logits)
    predicted = found[:, 0] if task.num_labels == 1 else found.argmax(-1)
    return task.score(predicted.numpy(), labels)


def pooler_share(selection: Selection) -> float:
    """Return the share of the budget that lies in the pooler."""
    return sum(
        place.share
        for module, place in selection.places("module").items()
        if ".pooler." in module
    )


def table(results: dict[str, Any]) -> str:
    """Lay out one row per variant, with differences to IRD as published.

    Args:
        results: What the result file holds; it may be partial.
    """
    tuned = {name: tuned_runs(results["runs"], name) for name in VARIANTS}
    base = {(run["task"], run["seed"]): run["score"] for run in tuned["IRD"]}
    lines = [
        "| | seeds | score | against IRD | rate | in the pooler | seconds to select |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in tuned.items():
        if not runs:
            continue
        scores = [100 * run["score"] for run in runs]
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["rate"] for run in runs}))
        pooler = statistics.mean(run["pooler"] for run in runs)
        seconds = statistics.median(run["selection_seconds"] for run in runs)
        lines.append(
            f"| {name} | {len(runs)} | {spread(scores)} | {difference(runs, base)} | "
            f"{rates} | {pooler:.0%} | {seconds:.1f} |"
        )
    settings = results["settings"]
    tasks = ", ".join(sorted({run["task"] for run in results["runs"]}))
    note = (
        f"MiniLM, {tasks}, {settings['train']:,} training sentences, "
        f"{settings['epochs']} epochs, {settings['density']:.1%} of the linear layers, "
        "mean ± standard deviation; differences are paired over seeds. Where a row "
        f"has tried several rates, {HELD_OUT} held-out training sentences chose. "
        "One thread, beside other work, so that seconds are rough."
    )
    return "\n".join([*lines, "", note, ""])


def tuned_runs(runs: Sequence[Run], variant: str) -> list[Run]:
    """Return the runs at each task's learning rate that is best on held-out data."""
    mine = [run for run in runs if run["variant"] == variant]
    chosen: list[Run] = []
    for task in dict.fromkeys(run["task"] for run in mine):
        by_rate: dict[float, list[Run]] = {}
        for run in mine:
            if run["task"] == task:
                by_rate.setdefault(run["rate"], []).append(run)
        most = max(map(len, by_rate.values()))
        complete = [each for each in by_rate.values() if len(each) == most]
        chosen += max(
            complete, key=lambda each: statistics.mean(run["held_out"] for run in each)
        )
    return chosen


def difference(runs: Sequence[Run], base: dict[tuple[str, int], float]) -> str:
    """Return the mean paired difference and its standard error."""
    pairs = [
        100 * (run["score"] - base[run["task"], run["seed"]])
        for run in runs
        if (run["task"], run["seed"]) in base
    ]
    if not pairs or not any(pairs):
        return ""
    mean = f"{statistics.mean(pairs):+.1f}"
    if len(pairs) == 1:
        return mean
    return f"{mean} (s.e. {statistics.stdev(pairs) / len(pairs) ** 0.5:.1f})"


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
