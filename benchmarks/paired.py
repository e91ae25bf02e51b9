"""The test of paired differences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["sign_flip"]


def sign_flip(pairs: Sequence[float] | np.ndarray[Any, Any]) -> float:
    """Return how often random signs give a mean as far from zero, from both sides.

    It is exact up to 18 pairs, and taken from 99,999 draws beyond.

    Args:
        pairs: The differences, at least two.
    """
    test = stats.permutation_test(
        (np.asarray(pairs),),
        np.mean,
        permutation_type="samples",
        n_resamples=2**18 if len(pairs) <= 18 else 99_999,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
