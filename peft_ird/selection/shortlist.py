"""Where the best entries on fewer samples are looked for first."""

import math

from peft_ird.selection.entries import Entries, Stream
from peft_ird.selection.lots import Lots

__all__ = ["Shortlist"]

_ROUNDING = 1e-3  # what rounding may change of a score


class Shortlist:
    r"""Entries that were best on some samples, for rankings on fewer of these.

    A sum of squares over fewer samples is not larger: with the mean :math:`F_X` over
    samples X, and Y a part of them, :math:`F_Y \le F_X |X| / |Y|`. No entry outside
    the list has more of :math:`F_X` than the least in it; so entries of the list that
    have more of :math:`F_Y` than that, times :math:`|X| / |Y|`, are the best of all.

    Args:
        entries: The best of all candidates, with their scores.
        num_samples: How many samples these are means over.
        scope: What they were chosen within; not ``"balanced"``, as means of modules
            change with the samples.
        lots: Chance that the scores are mixed with; None for none.
    """

    def __init__(
        self, entries: Entries, num_samples: int, scope: str, lots: Lots | None
    ) -> None:
        self.entries = entries
        self.num_samples = num_samples
        self.scope = scope
        self.lots = lots

    def best(self, stream: Stream, num_samples: int, k: int) -> Entries | None:
        """Choose the k entries with the largest scores of all candidates.

        Args:
            stream: Parameter numbers and scores of the list's entries.
            num_samples: How many of the samples these are means over.
            k: How many.

        Returns:
            The entries; None if others might be among them.
        """
        rescored = self.entries.rescored(stream, self.lots)
        found = rescored.fewer(k, self.scope)
        if found is None:
            return None
        factor = self.num_samples / num_samples * (1 + _ROUNDING)
        pairs = zip(
            found.least(self.scope), self.entries.least(self.scope), strict=True
        )
        is_best = (
            math.isinf(mine) or mine > self._at_most(theirs, factor)
            for mine, theirs in pairs
        )
        return found if all(is_best) else None

    def _at_most(self, score: float, factor: float) -> float:
        """Return what a score, or its logarithm as a key, can have become."""
        if self.lots is None:
            return score * factor
        return score + math.log(factor) / self.lots.temperature
