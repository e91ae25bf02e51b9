"""Successive halving: short trainings for all cells, long ones for the best."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from peft_ird.search.outcome import CellRecord

__all__ = ["Rung", "SuccessiveHalving", "survivors"]


@dataclass(frozen=True)
class Rung:
    """A stop on the way to a full training.

    Args:
        cells: How many cells come to it.
        steps: Their training steps by then; None for a whole training.
    """

    cells: int
    steps: int | None


@dataclass(frozen=True)
class SuccessiveHalving:
    """Trains all cells a little and the best of them further (Jamieson and Talwalkar).

    Every cell trains to a first rung; the best ``1 / eta`` of them train ``eta`` times
    as far, and so on, until one is left, which is trained to the end. The learning
    rate follows the schedule of the full training throughout. The best are those of the
    least loss on the held-out part, if the evaluation tells it: a metric that counts is
    still at chance when the loss tells cells apart. Who wins in the end has the best
    score.

    Args:
        eta: One cell in how many goes on. With few cells one long rung tells more than
            several short ones, in which nothing has been learned yet.
        cost: Bound of all training steps together, in full trainings.

    Raises:
        ValueError: If ``eta`` is below 2, or ``cost`` is not above 1.
    """

    eta: int = 8
    cost: float = 2.0

    def __post_init__(self) -> None:
        if self.eta < 2 or not self.cost > 1:
            raise ValueError(
                "`eta` must be at least 2 and `cost` above 1 (one cell is trained to "
                f"the end), got eta={self.eta} and cost={self.cost}."
            )

    def rungs(self, cells: int, total_steps: int) -> tuple[Rung, ...]:
        r"""Return the rungs, the last one at the full training.

        With :math:`n_i` cells at rung i, which lies at the share :math:`r \eta^i` of
        the training, :math:`r` is the largest that keeps
        :math:`n_0 r + \sum_i n_i (\eta^i - \eta^{i - 1}) r + 1 - \eta^{l} r` at the
        bound, where l is the last rung but one.

        Args:
            cells: Number of cells.
            total_steps: Steps of a full training.

        Raises:
            ValueError: If a training is too short to be divided at this cost.
        """
        counts = [cells]
        while counts[-1] > 1:
            counts.append(math.ceil(counts[-1] / self.eta))
        far = [self.eta**i for i in range(len(counts) - 1)]
        if not far:
            return (Rung(1, total_steps),)
        weight = sum(
            (n - m) * x for (n, m), x in zip(pairwise(counts), far, strict=True)
        )
        share = min((self.cost - 1) / weight, 1 / far[-1])
        steps = [math.floor(share * x * total_steps + 1e-9) for x in far]
        if steps[0] < 1:
            raise ValueError(
                f"A training of {total_steps} steps is too short for {cells} cells at "
                f"cost={self.cost}: the first rung would have no step. Raise `cost`, "
                "or train without `halving`."
            )
        pairs = zip(counts, [*steps, total_steps], strict=True)
        rungs = [Rung(count, at) for count, at in pairs if at < total_steps]
        last = counts[len(rungs)]  # more than one, if all of them reach the end
        return (*rungs, Rung(last, total_steps))


def survivors(
    records: Sequence[CellRecord],
    rungs: Sequence[Rung],
    failed: Collection[int] = (),
) -> list[int]:
    """Return the numbers of the cells that come to the last of these rungs.

    Args:
        records: What is known of all cells.
        rungs: The rungs so far; all but the last have been trained for.
        failed: Cells that have failed; the next take their places.
    """
    alive = [i for i in range(len(records)) if i not in failed]
    for number, rung in enumerate(rungs[1:]):
        scored = [i for i in alive if records[i].rung > number]
        ranked = sorted(scored, key=lambda i: records[i].promise(number), reverse=True)
        alive = sorted(ranked[: rung.cells])
    return alive
