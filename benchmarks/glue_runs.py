"""Run the experiments of a list on GLUE, each to a result file of its own.

python benchmarks/glue_runs.py minilm --data-dir GLUE --workers 2 --minutes 60
python benchmarks/glue_runs.py smollm --data-dir GLUE --models FOLDER

The lists are in ``experiments``, and what they hold is said in ``experiment.py``. What
has a file in ``results/glue`` is not run again, and a stopped run leaves no file, so
the table grows with the time at hand.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiment import MAX_LENGTH, Experiment, Job, Result, load_results
from record import ROOT, git_state, machine, versions, write

from peft_ird.search.workers import end_with_parent

sys.path.insert(0, str(ROOT / "examples"))
import run_glue

MOST_TRIES = 2  # of a run whose worker is killed


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
    model = Experiment.load(options.experiment).settings["model"]
    if model != "minilm" and options.models is None:
        parser.error(
            f"{options.experiment} is for {model}: pass --models FOLDER, the folder "
            "that this model is in"
        )
    options.end = time.monotonic() + 60 * options.minutes
    tries: Counter[Job] = Counter()
    while True:
        try:
            return run_all(options, tries)
        except BrokenProcessPool:  # a worker was killed, as where memory is short
            print(
                "A worker was killed. What ran at that time is started "
                f"{MOST_TRIES} times at most; what is missing then, by another call.",
                flush=True,
            )


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
    max_length = settings.get("max_length", MAX_LENGTH)
    arguments += ["--max-length", str(max_length)]
    arguments += ["--options", json.dumps(row.get("options", {}))]
    if given.data_dir:
        arguments += ["--data-dir", given.data_dir]
    if "rank" in row:
        arguments += ["--rank", str(row["rank"])]
    if "head_rate" in settings:
        arguments += ["--head-lr", str(settings["head_rate"])]
    if settings["model"] != "minilm":
        arguments += ["--model", str(given.models / settings["model"])]
    result = run_glue.run(run_glue.parse_arguments(arguments))
    del result["peak_bytes"]  # of all runs of this process so far
    gc.collect()  # the Trainer is in reference cycles
    return {
        "job": asdict(job),
        **result,
        "model": settings["model"],
        "max_length": max_length,
        "precision": given.precision,
        "versions": versions(),
        "machine": machine(),
        "git": git_state(),
    }


if __name__ == "__main__":
    main()
