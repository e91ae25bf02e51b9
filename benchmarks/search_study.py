r"""Walk the paper's staircase on a GLUE task by FISH, IRD and reverse IRD.

python benchmarks/search_study.py --data-dir GLUE --output-dir FOLDER --task sst2 \
    --max-train 1500 --lr 3e-3

Each cell of the paper's Table 3 is fine-tuned and scored: FISH is what IRD is compared
with, reverse IRD the paper's contrastive study, and successive halving the cheap way to
the best cell. Cells are chosen on held-out training samples and reported on GLUE's
validation set. What is done is in FOLDER and is not repeated.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from record import RESULTS, ROOT, git_state, machine, versions, write

from peft_ird import Calibration, IRDConfig, SearchResult, TrainerEvaluate, search
from peft_ird.search.halving import SuccessiveHalving
from peft_ird.search.outcome import CellRecord, Outcome
from peft_ird.search.plot_search import draw_search
from peft_ird.selection.schedule import PAPER, Cell

sys.path.insert(0, str(ROOT / "examples"))
import run_glue
from glue_setup import Setup
from metrics import SCORES

ETA = 7  # one cut: with few cells a long first rung is worth more than a second one
COST = 1.9  # full fine-tunings that halving may train for; scoring is not in it
HALVED = "ird, halving"
UNUSED = {  # options of `run_glue`
    "--budget", "--density", "--head-lr", "--method", "--options", "--rank", "--save",
}  # fmt: skip
TITLES = {"fish": "FISH Mask", "ird": "IRD", "reverse_ird": "reverse IRD"}
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Search by each method, and write what came of it.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    options = parse_arguments(argv)
    setup = Setup(options)
    found = {}
    for name in (*TITLES, HALVED):
        halving = SuccessiveHalving(ETA, COST) if name == HALVED else None
        folder = Path(options.output_dir, name.replace(", ", "-"))
        result = study(setup, name.partition(",")[0], folder, halving)
        print(f"\n{name}\n{result.table()}", flush=True)
        found[name] = [asdict(record) for record in result.records]
    content = {
        "task": options.task,
        "metric": SCORES.get(options.task, "accuracy"),
        "settings": {
            name: getattr(options, name)
            for name in ("lr", "epochs", "max_train", "held_out", "seed", "scope")
        },
        "train": len(evaluation(setup).training_rows),
        "steps": evaluation(setup).total_steps,
        "searches": found,
        "halving": halving_facts(found["ird"], found[HALVED], evaluation(setup)),
        "versions": versions(),
        "machine": machine(),
        "git": git_state(),
    }
    write(RESULTS / f"search-{options.task}.json", content)


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """Return the options of `run_glue`, with those that are this script's."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--scope", default="global", help="of IRDConfig")
    mine, rest = parser.parse_known_args(argv)
    if given := UNUSED.intersection(part.partition("=")[0] for part in rest):
        parser.error(
            f"{', '.join(sorted(given))}: not for this script, whose methods and sizes "
            "are its own"
        )
    options = run_glue.parse_arguments(rest)
    options.scope = mine.scope
    return options


def study(
    setup: Setup, method: str, folder: Path, halving: SuccessiveHalving | None
) -> SearchResult:
    """Search by one method."""
    options = setup.options
    config = IRDConfig(
        task_type="SEQ_CLS",
        method=method,
        schedule="paper",
        density=PAPER[-1].density,
        target_modules="all-linear",
        scope=options.scope,
        seed=options.seed,
    )
    evaluate = evaluation(setup)
    calibration = Calibration(evaluate.training_rows, setup.collate)
    return search(
        setup.load_model, config, calibration, evaluate, folder, halving=halving
    )


def evaluation(setup: Setup) -> TrainerEvaluate:
    """Return the stock evaluation: held-out samples choose, validation is reported."""
    (validation,) = list(setup.evaluations.values())[:1]
    return TrainerEvaluate(
        setup.arguments(),
        setup.train,
        validation,
        setup.metrics,
        "score",
        setup.collate,
        held_out=setup.options.held_out,
        seed=setup.options.seed,
    )


def halving_facts(
    full: Sequence[Record], halved: Sequence[Record], evaluate: TrainerEvaluate
) -> Record:
    """Return what halving cost and found, beside the search of all cells.

    Args:
        full: The records of all cells, each trained to the end.
        halved: Those of halving.
        evaluate: The evaluation of both.
    """
    whole = {tuple(r["cell"]): r["outcomes"][-1] for r in full}
    best = max(whole.values(), key=lambda outcome: outcome["score"])
    finished = max(halved, key=lambda record: len(record["outcomes"]))
    chosen = whole[tuple(finished["cell"])]
    seconds = [outcome["seconds"] for outcome in whole.values()]
    spent = sum(o["seconds"] for r in halved for o in r["outcomes"])
    steps = sum(record["outcomes"][-1]["steps"] for record in halved)
    return {
        "cell": finished["cell"],
        "score": chosen["score"],
        "best_score": best["score"],
        "reported": chosen["reported"],
        "best_reported": best["reported"],
        "steps_in_trainings": steps / evaluate.total_steps,
        "seconds_in_trainings": spent / (sum(seconds) / len(seconds)),
        "all_cells_in_trainings": len(full),
    }


def load_searches(content: Record) -> dict[str, SearchResult]:
    """Return results as the library has them, from a result file.

    Args:
        content: The file's content.
    """
    return {
        name: SearchResult(
            Path(),
            IRDConfig(method=name.partition(",")[0], density=PAPER[-1].density),
            tuple(_record(record) for record in records),
        )
        for name, records in content["searches"].items()
    }


def _record(record: Record) -> CellRecord:
    outcomes = tuple(Outcome(**outcome) for outcome in record["outcomes"])
    return CellRecord(Cell(*record["cell"]), record["entries"], outcomes)


def table(content: Record) -> str:
    """Return the reported score of each cell, and what halving found and cost.

    Args:
        content: The content of a result file.
    """
    found = {name: content["searches"][name] for name in TITLES}
    names = [*found]
    lines = [
        f"| samples | density | entries | {' | '.join(TITLES[n] for n in names)} |",
        f"|---:|---:|---:|{'---:|' * len(names)}",
    ]
    for records in zip(*found.values(), strict=True):
        samples, density = records[0]["cell"]
        cells = [
            _scores(record, _chosen(found[name]))
            for name, record in zip(names, records, strict=True)
        ]
        lines.append(
            f"| {samples} | {density:.2%} | {records[0]['entries']:,} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", _note(content), ""])


def _scores(record: Record, chosen: Record) -> str:
    outcome = record["outcomes"][-1]
    text = f"{100 * outcome['reported']:.1f} ({100 * outcome['score']:.1f})"
    return f"**{text}**" if record is chosen else text


def _chosen(records: Sequence[Record]) -> Record:
    """Return the record that a search calls best."""
    return max(records, key=lambda record: _record(record).merit())


def _note(content: Record) -> str:
    settings, halving = content["settings"], content["halving"]
    samples, density = halving["cell"]
    trained = content.get("train")
    if trained is None:  # the first file, of fewer samples than its task has
        trained = settings["max_train"] - settings["held_out"]
    return (
        f"{content['task']}, MiniLM, {trained:,} training samples, "
        f"{settings['epochs']:g} epochs, rate {settings['lr']:g} for all "
        "cells and methods, not tuned, one seed: "
        f"{content['metric'].replace('_', ' ')} in points on GLUE's validation "
        f"set, in brackets on {settings['held_out']} held-out training samples, which "
        "choose the cell in bold. Successive halving chose "
        f"({samples}, {density:.2%}), whose full training scores "
        f"{100 * halving['score']:.1f} there, where the best cell has "
        f"{100 * halving['best_score']:.1f}. It took "
        f"{halving['steps_in_trainings']:.2f} full trainings in steps, "
        f"{halving['seconds_in_trainings']:.2f} in seconds with all scoring, of "
        f"{halving['all_cells_in_trainings']} cells."
    )


def draw_staircases(content: Record) -> Figure:
    """Draw the paper's Fig. 2: FISH and IRD.

    Args:
        content: The content of a result file.
    """
    found = load_searches(content)
    return draw_search(found["ird"], found["fish"], titles=("FISH Mask", "IRD"))


def draw_contrast(content: Record) -> Figure:
    """Draw the contrastive figure: IRD and its reverse.

    Args:
        content: The content of a result file.
    """
    found = load_searches(content)
    return draw_search(
        found["reverse_ird"], found["ird"], titles=("IRD", "reverse IRD")
    )


if __name__ == "__main__":
    main()
