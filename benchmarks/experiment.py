"""Lists of experiments: what is compared, what of it was run, and what is due.

A list (``experiments/NAME.toml``) has rows, what is compared, and rounds, what is run
first. Each run has a file in ``results/glue``.

The learning rate of each row is found by the first seed on some of the tasks: from the
row's ``rate`` and its neighbours it climbs a ladder until the neighbours of the best
have been tried, on the mean over training samples that are held out. All tasks and
seeds take that rate.
"""

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    import tomli as tomllib

__all__ = [
    "MAX_LENGTH",
    "Experiment",
    "Job",
    "Result",
    "best_rate",
    "load_results",
    "next_rates",
]

FOLDER = RESULTS / "glue"
EXPERIMENTS = ROOT / "benchmarks" / "experiments"
MAX_LENGTH = 128  # tokens of a sample, if the settings name no ``max_length``
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates
AVAILABLE = {"rte": 1992, "wnli": 508}  # training samples that are not held out
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
        settings: What all runs share: ``model``, ``train``, ``epochs`` and, if it is
            not that of the row, ``head_rate``.
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
    """Return the rates to try next; none when the best have two neighbours or an end.

    Args:
        scores: The scores of the rates tried so far.
        start: The rate to try first, one of the ladder's, with its neighbours.
    """
    first = tuple(rate for rate in _around(start) if rate not in scores)
    if first:
        return first
    best = scores[best_rate(scores)]
    beside = {n for rate in scores if scores[rate] == best for n in _around(rate)}
    return tuple(sorted(beside - scores.keys()))


def _around(rate: float) -> tuple[float, ...]:
    """Return a rate and its neighbours on the ladder."""
    place = LADDER.index(rate)
    return LADDER[max(0, place - 1) : place + 2]


def load_results(name: str) -> list[Result]:
    """Read what there is of an experiment, as its list is now.

    Args:
        name: The list's name.

    Raises:
        ValueError: If a result is not what the list asks for (method, options, rank,
            number of training samples, epochs, model, tokens, rate of the head), or its
            precision is not that of the others.
    """
    experiment = Experiment.load(name)
    found: list[Result] = []
    for path in sorted((FOLDER / name).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        row = experiment.rows.get(result["job"]["row"])
        if row is not None:
            first = found[0] if found else result
            asked = {"precision": first.get("precision"), **experiment.settings, **row}
            _check_asked(path, result, asked)
            found.append(result)
    return found


def _check_asked(path: Path, result: Result, asked: Mapping[str, Any]) -> None:
    task = result["job"]["task"]
    train = asked["train"].get(task, asked["train"]["others"])
    wanted = {
        "method": asked["method"],
        "options": asked.get("options", {}),
        "rank": asked.get("rank"),
        "train": min(train, AVAILABLE.get(task, train)),
        "epochs": asked["epochs"],
        "model": asked["model"],
        "max_length": asked.get("max_length", MAX_LENGTH),
        "head_rate": asked.get("head_rate", result["job"]["rate"]),
        "precision": asked["precision"],
    }
    for name, value in wanted.items():
        if result.get(name, value) != value:
            raise ValueError(
                f"{path.name} was run with {name} {result[name]!r}, but the list asks "
                f"for {value!r}, or other files have it. Delete the file, or give the "
                "row another name."
            )
