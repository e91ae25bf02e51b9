"""The tables of the GLUE experiments: scores, and paired differences.

A row's score on a task is that of its rate (`experiment`), on the validation set.
Differences are paired over tasks and seeds: both methods saw the same training samples,
order and head. What is said of them holds for these tasks and validation sets: seeds of
a task have those in common.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from experiment import (
    LADDER,
    MAX_LENGTH,
    Experiment,
    best_rate,
    load_results,
    next_rates,
)
from paired import sign_flip
from scipy import stats

Result = dict[str, Any]
Key = tuple[str, int]  # task and seed
Scores = dict[Key, float]

TITLES = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "rte": "RTE",
    "wnli": "WNLI",
}
ADVERSE = ("wnli",)  # most validation sentences are training ones, with other labels
ROUNDING = 1e-9  # points that equal means may differ by
METRICS = {
    "cola": "Matthews",
    "stsb": "mean of Pearson and Spearman",
    "mrpc": "mean of F1 and accuracy",
}


def chosen(
    experiment: Experiment, density: float, results: Sequence[Result]
) -> dict[str, dict[Key, Result]]:
    """Return the runs at each row's rate, by row, task and seed.

    A row is there once the first seed has found its rate.

    Args:
        experiment: The list.
        density: The budget.
        results: All runs of the list.
    """
    results = [result for result in results if result["job"]["density"] == density]
    found: dict[str, dict[Key, Result]] = {}
    for row, asked in experiment.rows.items():
        tried = experiment.tuned(results, row, density)
        if next_rates(tried, asked["rate"]):
            continue
        for result in results:
            job = result["job"]
            if (job["row"], job["rate"]) == (row, best_rate(tried)):
                found.setdefault(row, {})[job["task"], job["seed"]] = result
    return found


def reported(result: Result) -> float:
    """Return the mean score of the validation splits, in points."""
    parts = [s["score"] for n, s in result["scores"].items() if n != "held_out"]
    return 100 * statistics.mean(parts)


def scores(runs: Mapping[Key, Result]) -> Scores:
    """Return the reported score of each run."""
    return {key: reported(result) for key, result in runs.items()}


def score_table(
    experiment: Experiment, density: float, label: str, constants: Mapping[str, float]
) -> str:
    """Return a row per method with mean ± standard deviation over seeds.

    Args:
        experiment: The list.
        density: The budget.
        label: What the model is called.
        constants: What a constant answer scores on each task.
    """
    found = chosen(experiment, density, load_results(experiment.name))
    tasks = [
        t for t in TITLES if any(t == k[0] for runs in found.values() for k in runs)
    ]
    mean = ["mean"] if len(tasks) > 1 else []
    head = ["", "entries", *(TITLES[task] for task in tasks), *mean, "rate"]
    lines = headed(head)
    for row, runs in found.items():
        known = scores(runs).items()
        cells = [
            cell([s for (name, _), s in known if name == task], len(experiment.seeds))
            for task in tasks
        ]
        if mean:
            means = _task_means(runs).values()
            is_whole = len(runs) == len(tasks) * len(experiment.seeds)
            cells.append(f"{statistics.mean(means):.1f}" if is_whole else "")
        rate = f"{next(iter(runs.values()))['rate']:g}"
        entries = max(result["entries"] for result in runs.values())
        lines.append(line([row, f"{entries:,}", *cells, rate]))
    constant = [100 * constants[task] for task in tasks]
    cells = [f"{score:.1f}" for score in constant]
    if mean:
        cells.append(f"{statistics.mean(constant):.1f}")
    lines.append(line(["a constant answer", "0", *cells, ""]))
    return "\n".join([*lines, "", _note(experiment, found, density, label), ""])


def line(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def headed(titles: Sequence[str]) -> list[str]:
    """Return the first two lines of a table, numbers to the right."""
    return [line(titles), f"|---|{'---:|' * (len(titles) - 1)}"]


def cell(values: Sequence[float], seeds: int) -> str:
    """Return mean ± standard deviation, with the number of values if seeds miss."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    fewer = f" ({len(values)})" if len(values) < seeds else ""
    return f"{statistics.mean(values):.1f}{spread}{fewer}"


def _task_means(runs: Mapping[Key, Result]) -> dict[str, float]:
    values = defaultdict(list)
    for (task, _), result in runs.items():
        values[task].append(reported(result))
    return {task: statistics.mean(found) for task, found in values.items()}


def _note(
    experiment: Experiment,
    found: Mapping[str, Mapping[Key, Result]],
    density: float,
    label: str,
) -> str:
    results = [result for runs in found.values() for result in runs.values()]
    first = results[0]
    train = {result["task"]: f"{result['train']:,}" for result in results}
    sizes = ", ".join(
        f"{TITLES[task]} {train[task]}" for task in TITLES if task in train
    )
    tuning = " and ".join(TITLES[task] for task in experiment.tuning)
    of_head = experiment.settings.get("head_rate")
    at = "the rate of its row" if of_head is None else f"{of_head:g} in all rows"
    return (
        f"{label}, budget {density:.2%} of its {first['budget'] / density / 1e6:.1f} M "
        f"weights, training samples drawn by the seed: {sizes}; "
        f"at most {experiment.settings.get('max_length', MAX_LENGTH)} tokens; "
        f"{experiment.settings['epochs']} epochs of batches of 32; GLUE's validation "
        f"sets. Mean ± standard deviation over {len(experiment.seeds)} seeds, or as "
        f"many as stand in brackets; {_metrics(train)}. Rates climb a "
        f"ladder of two per decade, judged on 500 training samples of {tuning} "
        f"that the first seed holds out; {LADDER[-1]:g} is the highest. The head is "
        f"trained as well, at {at}. {_twice(found)}"
        f"Products in float32 of {first['precision']} precision, torch "
        f"{first['versions']['torch']}, peft {first['versions']['peft']}."
    )


def _twice(rows: Collection[str]) -> str:
    if "Diff Pruning" not in rows:
        return ""
    return "Diff Pruning trains twice: to choose, and what it chose. "


def _metrics(tasks: Collection[str]) -> str:
    """Return what the scores of these tasks are."""
    special = [f"{TITLES[task]}: {METRICS[task]}" for task in METRICS if task in tasks]
    return "; ".join([*special, "others: accuracy"] if special else ["accuracy"])


def compared(ours: Scores, theirs: Scores) -> dict[str, float]:
    """Return the mean of paired differences in points, with an interval and p.

    All tasks have the same seeds, so that each has the same weight: those tasks and
    seeds that make the most pairs. The interval is Student's over the pairs; p is that
    of the exact two-sided sign-flip test, up to 18 pairs, and of 99,999 draws beyond.
    Both take the pairs for independent; ``p_tasks`` takes each task's mean for one.

    Args:
        ours: Scores by task and seed.
        theirs: Those of the other method; pairs are what both have.
    """
    keys = _even(ours.keys() & theirs.keys())
    pairs = np.array([ours[key] - theirs[key] for key in keys])
    gaps = defaultdict(list)
    for (task, _), gap in zip(keys, pairs, strict=True):
        gaps[task].append(gap)
    by_task = {task: float(np.mean(each)) for task, each in gaps.items()}
    kept = [gap for task, gap in by_task.items() if task not in ADVERSE]
    found = {
        "pairs": float(len(pairs)),
        "mean": float(np.mean(pairs)) if keys else float("nan"),
        "tasks": float(len(by_task)),
        "not_worse": float(sum(gap >= -ROUNDING for gap in by_task.values())),
        "without": statistics.mean(kept) if kept else float("nan"),
    }
    if len(pairs) < 2 or not pairs.any():
        return found
    if len(by_task) > 1:
        found["p_tasks"] = sign_flip([*by_task.values()])
    low, high = stats.ttest_1samp(pairs, 0.0).confidence_interval(0.95)
    return {**found, "low": float(low), "high": float(high), "p": sign_flip(pairs)}


def _even(keys: Collection[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the most keys whose tasks have the same seeds, of many tasks rather."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for task, seed in keys:
        seeds[task].add(seed)
    best: list[tuple[str, int]] = []
    for count in range(1, 1 + max(map(len, seeds.values()), default=0)):
        tasks = [task for task, each in seeds.items() if len(each) >= count]
        common = set.intersection(*(seeds[task] for task in tasks))
        found = sorted((task, seed) for task in tasks for seed in common)
        best = max(best, found, key=len)
    return best


def difference_table(
    experiment: Experiment, density: float, rows: Sequence[str], others: Sequence[str]
) -> str:
    """Return a line per pair of methods: difference, interval, p, tasks not lost.

    A pair that comes twice, as each over the other, is shown once.

    Args:
        experiment: The list.
        density: The budget.
        rows: Whose gain is shown.
        others: Over whom.
    """
    runs = chosen(experiment, density, load_results(experiment.name))
    found = {row: scores(each) for row, each in runs.items()}
    head = [
        "", "difference", "95 % interval", "p, pairs", "pairs", "p, tasks",
        "tasks not worse", "without WNLI",
    ]  # fmt: skip
    lines = headed(head)
    shown: list[set[str]] = []
    for row, other in itertools.product(rows, others):
        pair = {row, other}
        if len(pair) < 2 or pair in shown or not pair <= found.keys():
            continue
        shown.append(pair)
        gap = compared(found[row], found[other])
        if not gap["pairs"]:
            continue
        interval = f"{gap['low']:+.1f} to {gap['high']:+.1f}" if "low" in gap else ""
        lines.append(
            line(
                [
                    f"{row} over {other}",
                    f"{gap['mean']:+.1f}",
                    interval,
                    f"{gap['p']:.3f}" if "p" in gap else "",
                    f"{gap['pairs']:.0f}",
                    f"{gap['p_tasks']:.3f}" if "p_tasks" in gap else "",
                    f"{gap['not_worse']:.0f} of {gap['tasks']:.0f}",
                    f"{gap['without']:+.1f}",
                ]
            )
        )
    return "\n".join([*lines, ""])
