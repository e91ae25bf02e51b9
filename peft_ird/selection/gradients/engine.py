"""Passes over samples: in batches where that is exact, one by one where it is not.

Before the first pass, a few samples go through the model together and alone (`Trial`).
Parameters whose gradients differ, as they are used in a way that `Capture` does not
know or the model mixes its samples, are taken one sample at a time from then on.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NoReturn

from torch import Tensor
from tqdm.auto import tqdm

from peft_ird.selection.gradients.batching import Sample, plan
from peft_ird.selection.gradients.dense import Dense
from peft_ird.selection.gradients.forms import SampleGradients
from peft_ird.selection.gradients.kept import KeptGradients
from peft_ird.selection.gradients.limits import Limits
from peft_ird.selection.gradients.ordered import bytes_per_entry
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.gradients.recorder import Observer
from peft_ird.selection.gradients.singles import Singles
from peft_ird.selection.gradients.statistics import Receiver, Statistic
from peft_ird.selection.gradients.together import Passed, Together, size_of
from peft_ird.selection.gradients.trial import Outcome, Trial

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

_WINDOW = 2048  # samples that are sorted by length together


class Engine:
    """Hands the gradients of single samples to statistics.

    Args:
        singles: The samples, one at a time.
        ranks: The processes that share the work.
        limits: What a pass may take.
    """

    def __init__(self, singles: Singles, ranks: Ranks, limits: Limits) -> None:
        self.singles = singles
        self.ranks = ranks
        self.together = Together(singles)
        self.losses: dict[int, float] = {}
        self._limits = limits
        self._pool = singles.pool
        self._outcome: Outcome | None = None
        self.kept = KeptGradients()

    def prepare(self, samples: Sequence[int]) -> Outcome:
        """Find out what is exact in batches, from a few of the samples; once.

        Args:
            samples: Positions in the calibration data.
        """
        if self._outcome is None:
            groups = list(self._groups(range(len(self._pool.sizes))))
            trial = Trial(self.together, groups, self._limits.batch_size)
            with self.ranks.raising_together():
                outcome = trial.outcome(samples)
            outcome = outcome.agreed(self.ranks.gather(outcome))
            self._share_scale()
            self._outcome = outcome
            if outcome.alone:
                logger.info(
                    "Gradients of %d of %d parameters are taken one sample at a time, "
                    "beginning with '%s'.",
                    len(outcome.alone),
                    len(self._pool.sizes),
                    self._pool.name(min(outcome.alone)),
                )
            elif outcome.is_single and self._limits.batch_size != 1 < len(samples):
                logger.info(
                    "No two of the %d samples may share a batch, as their fields "
                    "differ in shape or dtype; they are taken one at a time.",
                    len(samples),
                )
        return self._outcome

    def run(
        self,
        samples: Sequence[int],
        parts: Sequence[int],
        statistic: Statistic,
        title: str,
    ) -> bool:
        """Go through samples; this process takes its share of them.

        Args:
            samples: Positions in the calibration data.
            parts: Numbers of the parameters.
            statistic: What the gradients are handed to.
            title: Title of the progress bar.

        Returns:
            Whether all went well; if not, a parameter was used in another way than in
            the trial. It goes alone from now on: start again with a new statistic.

        Raises:
            ValueError: If a sample's loss is not finite or its labels are wrong.
        """
        outcome = self.prepare(samples)
        misfits: frozenset[int] = frozenset()
        together = [part for part in parts if part not in outcome.alone]
        alone = [part for part in parts if part in outcome.alone]
        self._replay(samples, together, statistic)
        everywhere = self.kept.everywhere
        rest = [s for s in samples if s not in everywhere] if together else []
        total = len(rest) + len(samples) * bool(alone)
        if not total:  # on all processes alike
            return True
        for known in rest:
            self.losses.pop(known, None)
        with self._bar(total, title) as bar:
            with self.ranks.raising_together():
                batches = self.batches(rest)
            for every, batch in self.ranks.rounds(batches):
                with self.ranks.raising_together():
                    misfits |= self._run_batch(batch or (), together, statistic)
                statistic.end_round(together)
                bar.update(sum(map(len, every)))
            for some, position in self.ranks.rounds(samples if alone else ()):
                with self.ranks.raising_together():
                    if position is not None:
                        self._run_alone(position, alone, statistic)
                statistic.end_round(alone)
                bar.update(len(some))
        return self._fits(misfits)

    def _replay(
        self, samples: Sequence[int], parts: Sequence[int], statistic: Statistic
    ) -> None:
        """Hand out what is kept, parameter by parameter perhaps: many short rounds."""
        error: Exception | None = None
        wanted = frozenset(samples)
        for batch in self.kept.batches(wanted):
            try:
                if error is None:
                    batch.hand_out(wanted, parts, statistic)
            except Exception as problem:  # the others are told after the last round
                error = problem
            statistic.end_round(parts)
        self.ranks.raise_together(error)

    def _bar(self, total: int, title: str) -> "tqdm[NoReturn]":
        """Return a progress bar over samples; only the first process shows it."""
        hidden = True if self.ranks.rank or not total else None
        return tqdm(total=total, desc=title, leave=False, disable=hidden)

    def _fits(self, misfits: frozenset[int]) -> bool:
        """Let what does not fit go alone on all processes; return whether all fits."""
        outcome = self._outcome
        assert outcome is not None
        self._share_scale()
        alone = outcome.alone.union(*self.ranks.gather(misfits))
        self._outcome = replace(outcome, alone=alone)
        if alone == outcome.alone:
            return True
        self.kept = KeptGradients()
        return False

    def _share_scale(self) -> None:
        """Lower the scale of the loss on all processes as far as on any of them."""
        self.singles.scale = min(self.ranks.gather(self.singles.scale))

    def remember(self, samples: Sequence[int]) -> None:
        """Keep the gradients of as many samples as fit, for passes to come.

        Args:
            samples: Positions in the calibration data.
        """
        outcome = self.prepare(samples)
        misfits: frozenset[int] = frozenset()
        parts = range(len(self._pool.sizes))
        together = [part for part in parts if part not in outcome.alone]
        with self.ranks.raising_together():
            fitting = list(self._fitting(samples, outcome)) if together else []
        with (
            self.ranks.raising_together(),
            self._bar(sum(map(len, fitting)), "Gradients") as bar,
        ):
            for every, batch in self.ranks.rounds(fitting):
                positions = [sample.position for each in every for sample in each]
                own = [sample.position for sample in batch or ()]
                receiver = self.kept.add(positions, own)
                misfits |= self._run_batch(batch or (), together, receiver)
                bar.update(len(positions))
        if not self._fits(misfits):
            self.remember(samples)

    def has_kept(self, samples: Sequence[int]) -> bool:
        """Return whether no pass over these samples needs the model."""
        outcome = self.prepare(samples)
        return not outcome.alone and self.kept.everywhere.issuperset(samples)

    def batches(self, samples: Sequence[int]) -> list[list[Sample]]:
        """Divide samples into batches, the same on every process.

        Args:
            samples: Positions in the calibration data.
        """
        if not samples:
            return []
        outcome = self.prepare(samples)
        is_single = outcome.is_single or len(outcome.alone) == len(self._pool.sizes)
        tokens = self._limits.tokens
        if self._limits.activation_bytes is not None:
            fitting = self._limits.activation_bytes / max(1.0, outcome.activation_bytes)
            tokens = max(1, min(tokens, int(fitting)))
        found = []
        remaining = iter(samples)
        while window := list(islice(remaining, _WINDOW)):
            loaded = [self.singles.sample(s, outcome.padded) for s in window]
            size = 1 if is_single else self._limits.batch_size
            found += plan(loaded, tokens, size, outcome.padded)
        return found

    def name_what_is_not_finite(
        self, samples: Sequence[int], parts: Sequence[int]
    ) -> NoReturn:
        """Find the sample whose loss or gradient is not finite, and say which.

        Args:
            samples: Positions in the calibration data, one of them at fault.
            parts: Numbers of the parameters.

        Raises:
            ValueError: Always; it names the sample if one is at fault alone.
        """
        for position in samples:
            for group in self._groups(parts):
                self.singles.gradients(position, group)
        dtypes = {str(self._pool.parameters[part].dtype) for part in parts}
        raise ValueError(
            f"Losses and gradients of the {len(samples)} calibration samples are "
            "finite, but sums over them are not: parameters are of "
            f"{', '.join(sorted(dtypes))}, losses times {self.singles.scale:g}. Look "
            "for samples with an enormous loss, or load the model in float32 if it is "
            "not."
        )

    def _fitting(
        self, samples: Sequence[int], outcome: Outcome
    ) -> Iterator[list[Sample]]:
        """Yield the first batches whose gradients fit the cache, on all processes."""
        left = float(self._limits.cache_bytes)
        for batch in self.batches(samples):
            left -= size_of(batch) * outcome.token_bytes
            left -= len(batch) * outcome.sample_bytes
            if left < 0:
                return
            yield batch

    def loss(self, batch: Sequence[Sample]) -> Tensor:
        """Return the sum of the losses that the samples of a batch have alone.

        Args:
            batch: One of `batches`.

        Raises:
            ValueError: If a sample's loss is not finite.
        """
        return self._run_together(batch, (), lambda *_: None).loss

    def _run_batch(
        self, batch: Sequence[Sample], parts: Sequence[int], receiver: Receiver
    ) -> frozenset[int]:
        """Hand a batch's gradients out; return the parameters that did not fit."""
        if not batch:
            return frozenset()
        positions = [sample.position for sample in batch]
        rows = range(len(batch))

        def observe(part: int, gradients: SampleGradients) -> None:
            receiver.update(part, gradients, rows, positions)

        passed = self._run_together(batch, parts, observe)
        if passed.losses is not None and self.prepare(positions).has_losses:
            self.losses.update(zip(positions, passed.losses.tolist(), strict=True))
        return passed.misfits

    def _run_together(
        self, batch: Sequence[Sample], parts: Sequence[int], observe: Observer
    ) -> Passed:
        """Take a batch through the model; name the sample if a loss is not finite."""
        try:
            return self.together.run(batch, parts, observe)
        except FloatingPointError:
            positions = [sample.position for sample in batch]
            every = range(len(self._pool.sizes))
            self.name_what_is_not_finite(positions, parts or every)

    def _run_alone(
        self, position: int, parts: Sequence[int], receiver: Receiver
    ) -> None:
        for group in self._groups(parts):
            loss, gradients = self.singles.gradients(position, group)
            self.losses[position] = loss
            while gradients:
                part, gradient = gradients.popitem()
                receiver.update(part, Dense(gradient[None]), (0,), (position,))

    def _groups(self, parts: Sequence[int]) -> Iterator[list[int]]:
        """Divide parameters into groups whose gradients may be formed at once."""
        wanted = set(parts)
        limit = self._limits.accumulator_bytes
        each = bytes_per_entry(self._pool, self.ranks)
        for group in self._pool.groups(limit, each):
            if not wanted.isdisjoint(group):
                yield [part for part in group if part in wanted]
