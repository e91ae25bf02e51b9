"""Score constant answers on GLUE: what a method gets that knows nothing of a sample.

python benchmarks/glue_constants.py --data-dir GLUE

The answer is the most frequent label of the training set; a constant has correlation 0
with anything.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

from glue_table import TITLES
from record import RESULTS, ROOT, git_state, versions, write

sys.path.insert(0, str(ROOT / "examples"))
from glue import GLUE
from metrics import GlueMetric

PATH = RESULTS / "glue-constants.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Score a constant answer to each task and write the result.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", help="folder with TASK/SPLIT.parquet; None: hub")
    parser.add_argument("--tasks", nargs="+", choices=[*GLUE], default=[*TITLES])
    options = parser.parse_args(argv)
    scores = {name: constant_score(name, options.data_dir) for name in options.tasks}
    write(PATH, {"scores": scores, "versions": versions(), "git": git_state()})


def constant_score(name: str, data_dir: str | None) -> float:
    """Return the mean score of one answer to all samples of the validation splits.

    Args:
        name: The task.
        data_dir: As for `GlueTask.read`.
    """
    task = GLUE[name]
    answer = statistics.mode(task.read("train", data_dir)["label"])
    found = []
    for split in task.evaluations:
        labels = task.read(split, data_dir)["label"]
        metrics = GlueMetric(name).compute(
            predictions=[answer] * len(labels), references=labels
        )
        found.append(metrics["score"])
    return statistics.mean(found)


if __name__ == "__main__":
    main()
