"""Run the experiments of a list on GLUE, each to a result file of its own.

python benchmarks/glue_runs.py minilm --data-dir GLUE --workers 2 --minutes 60

A list (``experiments/NAME.toml``) has rows, what is compared, and rounds, what is run
first. What has a file in ``results/glue`` is not run again, and a stopped run leaves no
file, so the table grows with the time at hand.

The learning rate of each row is found by the first seed on some of the tasks: from the
row's ``rate`` and its neighbours it climbs a ladder until both neighbours of the best
score worse, on the mean over training samples that are held out. All tasks and seeds
take that rate.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, git_state, machine, versions, write

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    import tomli as tomllib

sys.path.insert(0, str(ROOT / "examples"))
import run_glue

FOLDER = RESULTS / "glue"
EXPERIMENTS = ROOT / "benchmarks" / "experiments"
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates
MOST_TRIES = 2  # of a run whose worker is killed
_KEYS = ("rows", "rounds", "seeds", "tuning")
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        experiment: The list's name.
        task: The GLUE task.
        row: The row's name.
        density: Budget, as a share of the model without its head.
        rate: Learning rate.
        seed: Seed of everything.
    """

    experiment: str
    task: str
    row: str
    density: float
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        """The result file."""
        row = "".join(c if c.isalnum() else "-" for c in self.row.lower())
        name = "-".join(filter(None, row.split("-")))
        size = f"{100 * self.density:g}"
        parts = (self.task, name, size, f"{self.rate:g}", str(self.seed))
        return FOLDER / self.experiment / ("_".join(parts) + ".json")


@dataclass(frozen=True)
class Experiment:
    """A list of what is compared, and in which order it is run.

    Args:
        name: Its file's name.
        rows: What `run_glue` is asked for, by the row's name: ``method``, the first
            ``rate`` and, if need be, ``options`` of `IRDConfig` and LoRA's ``rank``.
        rounds: ``tasks``, ``densities`` and, if not all, ``rows``.
        seeds: All seeds; the first one chooses the rates.
        tuning: The tasks whose held-out scores choose them.
        settings: What all runs share: ``model``, ``train`` and ``epochs``.
    """

    name: str
    rows: dict[str, dict[str, Any]]
    rounds: list[dict[str, Any]]
    seeds: list[int]
    tuning: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str) -> "Experiment":
        """Read a list.

        Args:
            name: Its name in ``experiments``.
        """
        text = (EXPERIMENTS / f"{name}.toml").read_text(encoding="utf-8")
        content = tomllib.loads(text)
        known = {key: content.pop(key) for key in _KEYS}
        return cls(name=name, settings=content, **known)

    def cells(self) -> Iterator[tuple[str, str, float]]:
        """Yield each task, row and density once, in the order of the rounds."""
        seen = set()
        for each in self.rounds:
            rows = each.get("rows", [*self.rows])
            for density, row, task in itertools.product(
                each["densities"], rows, each["tasks"]
            ):
                if (task, row, density) not in seen:
                    seen.add((task, row, density))
                    yield task, row, density

    def jobs(self, results: Sequence[Result]) -> Iterator[Job]:
        """Yield what can be run now: rates by the first seed, then the other seeds.

        Args:
            results: What there is.
        """
        for each in self.rounds:
            rows = each.get("rows", [*self.rows])
            for seed in self.seeds:
                for density, row, task in itertools.product(
                    each["densities"], rows, each["tasks"]
                ):
                    for rate in self.rates(results, task, row, density, seed):
                        yield Job(self.name, task, row, density, rate, seed)

    def rates(
        self, results: Sequence[Result], task: str, row: str, density: float, seed: int
    ) -> Sequence[float]:
        """Return the rates to run: those to try, or the one that they led to."""
        scores = self.tuned(results, row, density)
        untried = next_rates(scores, self.rows[row]["rate"])
        if not untried:
            return (best_rate(scores),)
        return untried if seed == self.seeds[0] and task in self.tuning else ()

    def tuned(
        self, results: Sequence[Result], row: str, density: float
    ) -> dict[float, float]:
        """Return the mean held-out score of each rate that all tuning tasks have had.

        Args:
            results: What there is.
            row: The row's name.
            density: The density.
        """
        found: dict[float, dict[str, float]] = {}
        for result in results:
            job = result["job"]
            wanted = (row, density, self.seeds[0])
            if (job["row"], job["density"], job["seed"]) != wanted:
                continue
            if job["task"] in self.tuning:
                score = result["scores"]["held_out"]["score"]
                found.setdefault(job["rate"], {})[job["task"]] = score
        return {
            rate: statistics.mean(scores.values())
            for rate, scores in found.items()
            if len(scores) == len(self.tuning)
        }


def best_rate(scores: Mapping[float, float]) -> float:
    """Return the rate with the best score, the smallest of equals."""
    return max(sorted(scores), key=scores.__getitem__)


def next_rates(scores: Mapping[float, float], start: float) -> tuple[float, ...]:
    """Return the rates to try next; none when the best has two neighbours or an end.

    Args:
        scores: The scores of the rates tried so far.
        start: The rate to try first, one of the ladder's, with its neighbours.
    """
    first = tuple(rate for rate in _around(start) if rate not in scores)
    if first:
        return first
    return tuple(rate for rate in _around(best_rate(scores)) if rate not in scores)


def _around(rate: float) -> tuple[float, ...]:
    """Return a rate and its neighbours on the ladder."""
    place = LADDER.index(rate)
    return LADDER[max(0, place - 1) : place + 2]


def load_results(name: str) -> list[Result]:
    """Read what there is of an experiment, as its list is now.

    Args:
        name: The list's name.

    Raises:
        ValueError: If a row's result was run by another method or for other epochs.
    """
    experiment = Experiment.load(name)
    found = []
    for path in sorted((FOLDER / name).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        row = experiment.rows.get(result["job"]["row"])
        if row is not None:
            _check_asked(path, result, {**experiment.settings, **row})
            found.append(result)
    return found


def _check_asked(path: Path, result: Result, asked: Mapping[str, Any]) -> None:
    wanted = {
        "method": asked["method"],
        "options": asked.get("options", {}),
        "epochs": asked["epochs"],
    }
    for name, value in wanted.items():
        if result.get(name, value) != value:
            raise ValueError(
                f"{path.name} was run with {name} {result[name]!r}, but the list asks "
                f"for {value!r}. Delete the file, or give the row another name."
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has no result file yet, until there is none or the time is up.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("experiment", help="name of a list in benchmarks/experiments")
    add("--data-dir", help="folder with TASK/SPLIT.parquet; None for the hub")
    add("--models", type=Path, help="folder of models that are not MiniLM")
    add("--workers", type=int, default=1, help="processes, with one thread each")
    add("--minutes", type=float, default=1e9, help="nothing starts after that")
    add("--precision", default="medium", help="of float32 products")
    options = parser.parse_args(argv)
    options.end = time.monotonic() + 60 * options.minutes
    tries: Counter[Job] = Counter()
    while True:
        try:
            return run_all(options, tries)
        except BrokenProcessPool:  # a worker was killed, as where memory is short
            print("A worker was killed; its runs are tried once more.", flush=True)


def run_all(options: argparse.Namespace, tries: Counter[Job]) -> None:
    """Run what has no result file yet, with one set of workers.

    Args:
        options: Those of the command line, and ``end``, the time that nothing starts
            after.
        tries: How often each job has been started; changed.

    Raises:
        BrokenProcessPool: If a worker was killed. Jobs are not started a third time.
    """
    spawn = multiprocessing.get_context("spawn")
    running: dict[Future[Result], Job] = {}
    with ProcessPoolExecutor(options.workers, spawn, end_with_parent) as pool:
        while True:
            experiment = Experiment.load(options.experiment)
            results = load_results(options.experiment)
            for job in experiment.jobs(results):
                is_late = time.monotonic() > options.end
                if len(running) == options.workers or is_late:
                    break
                is_due = job not in running.values() and tries[job] < MOST_TRIES
                if is_due and not job.path.exists():
                    tries[job] += 1
                    task = (job, experiment.rows[job.row], experiment.settings, options)
                    running[pool.submit(perform, *task)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if not report(job, future):
                    tries[job] = MOST_TRIES


def end_with_parent() -> None:
    """Let a worker end when the runner is killed; its run is left undone."""

    def wait_for_it() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()


def report(job: Job, future: "Future[Result]") -> bool:
    """Write what came of a job, or say why nothing did; return whether it ran.

    Raises:
        BrokenProcessPool: If its worker, or another one, was killed.
    """
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise error
    if error is not None:
        print(f"FAILED {job.path.stem}: {error!r}", flush=True)
        return False
    result = future.result()
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write(job.path, result)
    scores = {name: round(s["score"], 4) for name, s in result["scores"].items()}
    print(f"{job.path.stem} {scores} {result['seconds']['train']:.0f} s", flush=True)
    return True


def perform(
    job: Job, row: dict[str, Any], settings: dict[str, Any], given: argparse.Namespace
) -> Result:
    """Train once; what is written knows nothing of this machine's folders."""
    arguments = ["--task", job.task, "--method", row["method"]]
    arguments += ["--density", str(job.density), "--lr", str(job.rate)]
    arguments += ["--seed", str(job.seed), "--threads", "1"]
    arguments += ["--precision", given.precision]
    arguments += ["--epochs", str(settings["epochs"])]
    train = settings["train"]
    arguments += ["--max-train", str(train.get(job.task, train["others"]))]
    arguments += ["--max-length", str(settings.get("max_length", 128))]
    arguments += ["--options", json.dumps(row.get("options", {}))]
    if given.data_dir:
        arguments += ["--data-dir", given.data_dir]
    if "rank" in row:
        arguments += ["--rank", str(row["rank"])]
    if settings["model"] != "minilm":
        arguments += ["--model", str(given.models / settings["model"])]
    result = run_glue.run(run_glue.parse_arguments(arguments))
    del result["peak_bytes"]  # of all runs of this process so far
    gc.collect()  # the Trainer is in reference cycles
    return {
        "job": asdict(job),
        **result,
        "precision": given.precision,
        "versions": versions(),
        "machine": machine(),
        "git": git_state(),
    }


if __name__ == "__main__":
    main()
