r"""Diagonal Fisher information of single samples.

The gradient of sample n is that of its own loss, :math:`g_n = \partial \ell_n /
\partial \theta`, and :math:`F_X[j] = \frac{1}{|X|} \sum_{n \in X} g_n[j]^2` (Sung et
al., 2021, arXiv:2111.09839).
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from peft_ird.selection.calibration import Calibration
from peft_ird.selection.gradients.engine import Engine
from peft_ird.selection.gradients.limits import Limits
from peft_ird.selection.gradients.ordered import bytes_per_entry
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.gradients.singles import Singles
from peft_ird.selection.gradients.statistics import (
    CHOSEN_BYTES,
    GradientSum,
    Scores,
    SquareSum,
    SquareSumAt,
    Statistic,
)
from peft_ird.selection.gradients.where import Where
from peft_ird.selection.pool import Pool
from peft_ird.selection.warmup import warmed_up

__all__ = ["FisherEstimator"]

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Statistic)

# In float16 the smallest gradients of a loss near one would underflow.
_HALF_SCALE = 1024.0
_FEW_BYTES = 32 << 20  # of sums
# What rounding may add to a score, or take from a norm.
_ROUNDING = 1 + 1e-3
# The norm of an outer product takes t^2 (o + i) steps, a score a share of t o i. This
# is where norms are worth it, as t (o + i) / (o i).
_FEW_TOKENS = 1 / 5


class FisherEstimator:
    """Fisher information of entries and scores of samples, from one-sample gradients.

    Under ``torch.distributed`` every process takes its share of the samples, and all
    get the same results; all must make the same calls.

    Args:
        model: The model; use it inside `borrowed`.
        pool: The candidate entries.
        calibration: The samples.
        fisher_type: ``"empirical"`` or ``"sampled"`` labels.
        seed: Seed of the sampled labels; a sample's labels do not depend on the order.
        memory_limit: Bytes beyond the model for accumulators, activations and kept
            gradients. Half of it is for accumulators; more parameters than that holds
            are taken in groups, with a pass each. Default: what is free on a GPU;
            elsewhere no groups, and a quarter of the memory, at most 8 GiB, for kept
            gradients.

    Raises:
        ValueError: If ``memory_limit`` is too small for the largest parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Pool,
        calibration: Calibration,
        fisher_type: str = "empirical",
        seed: int = 0,
        memory_limit: int | None = None,
    ) -> None:
        self.pool = pool
        self._seed = seed
        self._seen: set[int] = set()  # parameters that some sample uses
        self._unused: set[str] = set()  # names of others, as far as they were told
        self._ranks = Ranks()
        limits = Limits.of(pool, calibration.batch_size, memory_limit, self._ranks)
        self._most_bytes = limits.accumulator_bytes
        self._entry_bytes = bytes_per_entry(pool, self._ranks)
        singles = Singles(model, pool, calibration, fisher_type, seed)
        self._engine = Engine(singles, self._ranks, limits)
        if any(p.dtype == torch.float16 for p in pool.parameters):
            self._engine.singles.scale = _HALF_SCALE

    @contextmanager
    def head_warmed_up(
        self,
        head: Sequence[nn.Parameter],
        samples: Sequence[int],
        steps: int,
        learning_rate: float,
    ) -> Iterator[None]:
        """Lend the model a head that was trained a little; it comes back as it was.

        Args:
            head: Parameters of the head.
            samples: Positions of the samples that will be ranked.
            steps: Steps of 32 samples, drawn from all calibration data.
            learning_rate: Adam's.

        Yields:
            Nothing; the head is warm inside.

        Raises:
            ValueError: If there is no head.
        """
        with ExitStack() as stack:
            with self._engine.singles.labelled():  # by which the head learns
                self._engine.prepare(samples)
                warm = warmed_up(self._engine, head, steps, learning_rate, self._seed)
                stack.enter_context(warm)
            yield

    def remember(self, samples: Sequence[int]) -> None:
        """Keep the gradients of as many samples as fit, for several passes over them.

        Args:
            samples: Positions in the calibration data.
        """
        self._engine.remember(samples)

    def has_kept(self, samples: Sequence[int]) -> bool:
        """Return whether gradients of all samples are kept."""
        return self._engine.has_kept(samples)

    def forget_all_but(self, samples: Sequence[int]) -> None:
        """Drop kept gradients that passes over ``samples`` will not need."""
        self._engine.kept.forget_all_but(samples)

    def batches(self, samples: Sequence[int]) -> list[list[int]]:
        """Return the batches that samples are taken in, as positions.

        Args:
            samples: Positions in the calibration data.
        """
        self._engine.prepare(samples)
        return [[s.position for s in batch] for batch in self._engine.batches(samples)]

    def fisher(self, samples: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the diagonal Fisher information of all candidates.

        Args:
            samples: Positions in the calibration data.

        Returns:
            Pairs of a parameter's number, in order, and mean squared gradients of its
            entries, 1-D, float32 (float64 for a float64 model).

        Raises:
            ValueError: If a loss or gradient is not finite, labels are missing or out
                of range, or a parameter gets no gradient from any sample.
        """
        return self._means(samples, SquareSum, "Fisher information")

    def mean_gradient(self, samples: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the gradient of the mean loss, as `fisher` does."""
        return self._means(samples, GradientSum, "Gradients")

    def _means(
        self, samples: Sequence[int], kind: type[SquareSum], title: str
    ) -> Iterator[tuple[int, Tensor]]:
        self._engine.prepare(samples)
        is_kept = self._engine.has_kept(samples)
        every = range(len(self.pool.sizes))
        # Over what is kept a pass costs no model call.
        most_bytes = min(self._most_bytes, _FEW_BYTES) if is_kept else self._most_bytes
        groups = self.pool.groups(most_bytes, self._entry_bytes)
        if is_kept:
            self._check_used(every, self._engine.kept.parts())
        for parts in groups:
            make = partial(kind, self.pool, parts, self._ranks)
            total = self._summed(samples, parts, make, title)
            if not is_kept:  # a module may be in two groups
                self._check_used(every if parts is groups[-1] else (), total.seen)
            for part in parts:
                yield part, total.mean(part, len(samples))

    def _summed(
        self,
        samples: Sequence[int],
        parts: Sequence[int],
        make: Callable[[], S],
        title: str,
    ) -> S:
        """Sum a statistic over samples and processes; low precision is scaled down."""
        while True:
            with self._ranks.raising_together():
                statistic = make()
            if not self._engine.run(samples, parts, statistic, title):
                del statistic
                continue
            if all(map(_is_finite, statistic.end())):
                return statistic
            del statistic  # before there is another
            self._engine.kept.forget_all_but(())
            if not self._engine.singles.lower_scale():
                self._engine.name_what_is_not_finite(samples, parts)

    def fisher_at(
        self, samples: Sequence[int], entries: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the Fisher information of chosen entries, as `fisher` does.

        Args:
            samples: Positions in the calibration data.
            entries: Sorted positions in each parameter, int64.
        """
        sizes = [len(flat) for flat in entries]
        every = self._where(entries)
        for group in self.pool.groups(self._most_bytes, CHOSEN_BYTES, sizes):
            chosen = {part: every.pop(part) for part in group if part in every}
            make = partial(SquareSumAt, self.pool, chosen, self._ranks)
            statistic = self._summed(samples, list(chosen), make, "Fisher information")
            while statistic.totals:
                part = min(statistic.totals)
                yield part, statistic.mean(part, len(samples))
            del chosen, make, statistic  # before the next group's are there

    def sample_scores(
        self,
        samples: Sequence[int],
        entries: Sequence[Tensor] | None,
        count: int | None = None,
    ) -> Tensor:
        r"""Return the score of each sample, :math:`\sum_{j \in P} g_n[j]^2`.

        A score is at most the squared norm of the whole gradient. Where that is cheap,
        and few are wanted, samples that it rules out are not scored.

        Args:
            samples: Positions in the calibration data.
            entries: Sorted positions in each parameter to sum over, int64; None for
                all candidates.
            count: How many of the largest scores are wanted; others may be -1.
                Default: all.

        Returns:
            Scores in the order of ``samples``. Shape ``[len(samples)]``, float64.
        """
        if entries is None:
            return self._scores(samples, range(len(self.pool.sizes)))
        chosen = self._where(entries)
        parts = list(chosen)
        is_few = count is not None and 2 * count < len(samples)
        if not is_few or not self._has_cheap_norms(samples, parts):
            return self._scores(samples, parts, chosen)
        bounds = self._scores(samples, parts) * _ROUNDING
        order = bounds.argsort(descending=True, stable=True)
        best, others = order[:count], order[count:]
        scores = torch.full_like(bounds, -1.0)
        for rows in (best, others):
            possible = rows[bounds[rows] >= scores[best].min()]
            some = [samples[row] for row in possible.tolist()]
            scores[possible] = self._scores(some, parts, chosen)
        return scores

    def _scores(
        self,
        samples: Sequence[int],
        parts: Sequence[int],
        chosen: Mapping[int, Where] | None = None,
    ) -> Tensor:
        """Return squared norms of gradients, or of their chosen entries."""
        make = partial(Scores, samples, chosen, self._ranks)
        return self._summed(samples, parts, make, "Sample scores").totals

    def _has_cheap_norms(self, samples: Sequence[int], parts: Sequence[int]) -> bool:
        """Return whether norms cost far less than scores: kept, and of few tokens."""
        shapes = [self.pool.parameters[part].shape for part in parts]
        sides = sum(sum(shape) for shape in shapes if len(shape) == 2)
        area = sum(shape.numel() for shape in shapes if len(shape) == 2)
        if not sides or not self._engine.has_kept(samples):
            return False
        return float(self.lengths(samples).mean()) <= _FEW_TOKENS * area / sides

    def losses(self, samples: Sequence[int]) -> Tensor:
        """Return the loss of each sample; a pass over the samples comes first.

        Args:
            samples: Positions in the calibration data.

        Returns:
            Shape ``[len(samples)]``, float64.
        """
        known: dict[int, float] = {}
        for losses in self._ranks.gather(self._engine.losses):
            known.update(losses)
        with self._ranks.raising_together():
            for position in samples:
                if position not in known:
                    known[position] = self._engine.singles.gradients(position, [0])[0]
        return torch.tensor([known[s] for s in samples], dtype=torch.float64)

    def unlabelled(self) -> set[int]:
        """Return the samples of passes so far that have a loss over no label."""
        return set().union(*self._ranks.gather(self._engine.singles.unlabelled))

    def lengths(self, samples: Sequence[int]) -> Tensor:
        """Return the tokens of each sample, one for samples without tokens.

        Args:
            samples: Positions in the calibration data.

        Returns:
            Shape ``[len(samples)]``, float64.
        """
        singles = self._engine.singles
        with self._ranks.raising_together():
            loaded = [singles.sample(position, is_cut=True) for position in samples]
        return torch.tensor([s.unmasked or 1 for s in loaded], dtype=torch.float64)

    def _where(self, entries: Sequence[Tensor]) -> dict[int, Where]:
        pairs = enumerate(zip(entries, self.pool.parameters, strict=True))
        return {
            part: Where(flat.to(parameter.device), parameter.shape)
            for part, (flat, parameter) in pairs
            if flat.numel()
        }

    def _check_used(self, parts: Sequence[int], seen: set[int]) -> None:
        # Samples that are kept may do without what all of them together use.
        self._seen.update(*self._ranks.gather(seen))
        unused = [self.pool.name(part) for part in parts if part not in self._seen]
        if len(unused) == len(self.pool.sizes):
            raise ValueError(
                f"The loss does not depend on any of the {len(unused)} targeted "
                f"parameters, from '{unused[0]}' to '{unused[-1]}'. Check "
                "`target_modules` and the loss."
            )
        modules = [self.pool.names[part][0] for part in self._seen]
        whole = [n for n in unused if n.rpartition(".")[0] not in modules]
        if whole:
            raise ValueError(
                "These parameters get no gradient from any sample: "
                f"{', '.join(whole)}. Name their modules in `exclude_modules`."
            )
        new = [name for name in unused if name not in self._unused]
        if new:
            self._unused.update(new)
            logger.warning(
                "These parameters get no gradient from any sample, though others of "
                "their modules do; their entries come last: %s.",
                ", ".join(new),
            )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all entries are; their sum might overflow, a mask takes memory."""
    return not len(tensor) or all(map(math.isfinite, tensor.aminmax()))
