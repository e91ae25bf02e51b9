"""Measure what options of the selection are worth, by training on real data.

python benchmarks/option_study.py --data-dir GLUE        # goes on where it stopped

Every seed draws its own training and held-out sentences, the same for all variants. A
variant trains at every rate with the first seeds; the rate that is best on their
held-out sentences is that of all its seeds. GLUE's validation set is what is reported.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from paired import sign_flip
from peft import get_peft_model
from record import RESULTS, ROOT, git_state, machine, versions, write
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from peft_ird import Calibration, IRDConfig, Selection, select_parameters

sys.path.insert(0, str(ROOT / "examples"))
from tasks import Task, load_tokenizer, packaged_minilm

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
RATES = (5e-3, 1e-2)
RANDOM_RATES = (2e-2, 5e-2)
HELD_OUT, REPORTED = 500, 872
TUNING = 2  # seeds that a variant tries all rates with
Run = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the result file yet, one seed after the other.

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
    add("--threads", type=int, default=1)
    add("--minutes", type=float, default=60.0, help="no selection starts after that")
    add("--output", type=Path, default=RESULTS / "option-study.json")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(options.threads)
    end = time.monotonic() + 60 * options.minutes
    results = load(options)
    done = {key(run) for run in results["runs"]}
    for seed, task, variant in itertools.product(
        options.seeds, options.tasks, options.variants
    ):
        wanted = {"task": task, "variant": variant, "seed": seed}
        if key(wanted) not in done and time.monotonic() < end:
            for run in train(wanted, rates(results["runs"], wanted), options):
                results["runs"].append(run)
                print({k: v for k, v in run.items() if k != "kinds"}, flush=True)
            write(options.output, results)
    print(table(results))


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far, or new ones.

    Raises:
        ValueError: If the results so far are of other settings.
    """
    settings = {
        "train": options.train,
        "held_out": HELD_OUT,
        "reported": REPORTED,
        "sentences": "drawn by seed",
        "epochs": options.epochs,
        "tuning_seeds": TUNING,
        "threads": options.threads,
        **BASE,
    }
    if options.output.exists():
        found: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise ValueError(
                f"{options.output.name} holds runs with {found['settings']}, which "
                f"cannot stand beside runs with {settings}; give another `--output`."
            )
        return found
    return {
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "git": git_state(),
        "runs": [],
    }


def key(run: Run) -> tuple[Any, ...]:
    """Return what makes a run of all rates the same as another."""
    return run["task"], run["variant"], run["seed"]


def rates(runs: Sequence[Run], wanted: Run) -> tuple[float, ...]:
    """Return the rates to train at: all of them, or what the first seeds chose."""
    mine = [run for run in runs if key(run)[:2] == key(wanted)[:2]]
    if len({run["seed"] for run in mine}) < TUNING:
        return RANDOM_RATES if wanted["variant"] == "random" else RATES
    return (best_rate(mine),)


def best_rate(runs: Sequence[Run]) -> float:
    """Return the rate that is best on held-out sentences of the seeds that tried all.

    Args:
        runs: Runs of one variant and task.
    """
    by_seed: dict[int, dict[float, float]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], {})[run["rate"]] = run["held_out"]
    most = max(map(len, by_seed.values()))
    tuning = [each for each in by_seed.values() if len(each) == most]
    return max(tuning[0], key=lambda rate: statistics.mean(s[rate] for s in tuning))


def train(
    wanted: Run, tried: Sequence[float], options: argparse.Namespace
) -> list[Run]:
    """Select once, then train and score at each rate."""
    seed, variant = wanted["seed"], wanted["variant"]
    tokenizer = load_tokenizer(packaged_minilm())
    collate = DataCollatorWithPadding(tokenizer)
    task = drawn(Path(options.data_dir, wanted["task"]), options.train, seed)
    rows = task.tokens("train", tokenizer)
    evaluation = task.tokens("evaluation", tokenizer)
    train_rows = rows.select(range(options.train))
    held_out = rows.select(range(options.train, len(rows)))

    def fresh() -> nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            packaged_minilm(), num_labels=task.num_labels
        )

    settings = {"task_type": "SEQ_CLS", "seed": seed, **BASE, **VARIANTS[variant]}
    calibration = Calibration(train_rows, collate)
    start = time.perf_counter()
    selection = select_parameters(fresh(), IRDConfig(**settings), calibration)
    seconds = time.perf_counter() - start
    runs = []
    for rate in tried:
        config = IRDConfig(**settings, selection=selection)
        model = get_peft_model(fresh(), config)
        run = {**wanted, "rate": rate}
        fit(model, train_rows, collate, run, options.epochs)
        runs.append(
            {
                **run,
                "held_out": score(model, held_out, collate, task),
                "score": score(model, evaluation, collate, task),
                "metric": task.metric,
                "selection_seconds": seconds,
                "pooler": pooler_share(selection),
                "kinds": {k: p.share for k, p in selection.places("kind").items()},
            }
        )
    return runs


def drawn(folder: Path, size: int, seed: int) -> Task:
    """Read a task; the seed draws its training sentences, then those held out."""
    task = Task.from_parquet(folder, sys.maxsize, REPORTED)
    rows = task.train.shuffle(seed=seed).select(range(size + HELD_OUT))
    return replace(task, train=rows)


def fit(
    model: nn.Module, rows: Any, collate: Any, run: Run, epochs: int, size: int = 32
) -> None:
    """Train with AdamW and a rate that falls to zero; like lengths share a batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run["rate"], weight_decay=0.0)
    generator = torch.Generator().manual_seed(run["seed"])
    steps = epochs * (len(rows) // size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    samples = list(rows)
    model.train()
    for _ in range(epochs):
        for batch in batches(samples, size, generator):
            model(**collate(batch)).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def batches(
    samples: Sequence[Run], size: int, generator: torch.Generator
) -> Iterator[list[Run]]:
    """Yield full batches of like lengths, drawn and ordered by chance."""
    count = len(samples) // size
    order = torch.randperm(len(samples), generator=generator).tolist()[: count * size]
    order.sort(key=lambda i: len(samples[i]["input_ids"]))
    for n in torch.randperm(count, generator=generator).tolist():
        yield [samples[i] for i in order[n * size : (n + 1) * size]]


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
        "| | seeds | score | against IRD | p | rate | in the pooler | "
        "seconds to select |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in tuned.items():
        if not runs:
            continue
        scores = [100 * run["score"] for run in runs]
        pairs = differences(runs, base)
        chosen = ", ".join(f"{r:g}" for r in sorted({run["rate"] for run in runs}))
        pooler = statistics.mean(run["pooler"] for run in runs)
        seconds = statistics.median(run["selection_seconds"] for run in runs)
        lines.append(
            f"| {name} | {len(runs)} | {spread(scores)} | {mean_and_error(pairs)} | "
            f"{_chance(pairs)} | {chosen} | {pooler:.0%} | {seconds:.1f} |"
        )
    settings = results["settings"]
    tasks = ", ".join(sorted({run["task"] for run in results["runs"]}))
    threads = settings["threads"]
    note = (
        f"MiniLM, {tasks}, {settings['train']:,} training sentences drawn anew by each "
        f"seed, {settings['epochs']} epochs, {settings['density']:.1%} of the linear "
        f"layers; {settings['reported']} validation sentences are scored. Mean ± "
        "standard deviation; differences to IRD are paired over seeds, p is that of "
        "their exact two-sided sign-flip test. Of two rates for each row, "
        f"{settings['held_out']} held-out training sentences of the first "
        f"{settings['tuning_seeds']} seeds chose. "
        f"{threads} thread{'s'[: threads > 1]}, beside other work, so that seconds are "
        "rough."
    )
    return "\n".join([*lines, "", note, ""])


def tuned_runs(runs: Sequence[Run], variant: str) -> list[Run]:
    """Return the runs at each task's learning rate that is best on held-out data."""
    mine = [run for run in runs if run["variant"] == variant]
    chosen: list[Run] = []
    for task in dict.fromkeys(run["task"] for run in mine):
        here = [run for run in mine if run["task"] == task]
        rate = best_rate(here)
        chosen += [run for run in here if run["rate"] == rate]
    return chosen


def differences(runs: Sequence[Run], base: dict[tuple[str, int], float]) -> list[float]:
    """Return the differences to IRD in points, paired; none for IRD itself."""
    pairs = [
        100 * (run["score"] - base[run["task"], run["seed"]])
        for run in runs
        if (run["task"], run["seed"]) in base
    ]
    return pairs if any(pairs) else []


def mean_and_error(pairs: Sequence[float]) -> str:
    """Return the mean and its standard error."""
    if not pairs:
        return ""
    mean = f"{statistics.mean(pairs):+.1f}"
    if len(pairs) == 1:
        return mean
    return f"{mean} (s.e. {statistics.stdev(pairs) / len(pairs) ** 0.5:.1f})"


def _chance(pairs: Sequence[float]) -> str:
    return f"{sign_flip(pairs):.3f}" if len(pairs) > 1 else ""


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
