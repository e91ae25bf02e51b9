"""The best on fewer samples, found in a list, against sorting everything."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ird import select_parameters
from peft_ird.selection.entries import SCOPES, Entries
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.lots import Lots
from peft_ird.selection.shortlist import Shortlist
from tests.test_entries import pool_of
from tests.test_selection import CELLS, config, problem

SIZES = (5, 3, 8)


def stream_of(squares, samples, positions=None):
    """Means over some samples, by parameter, as a pass over them yields them."""
    means = squares[samples].mean(0).split(SIZES)
    for part, mean in enumerate(means):
        if positions is None:
            yield part, mean
        elif len(positions[part]):
            yield part, mean[positions[part]]


@given(
    st.integers(0, 999),
    st.sampled_from(["global", "per_module"]),
    st.sampled_from([0.0, 0.5, 4.0]),
    st.integers(2, 16),
    st.integers(1, 15),
    st.integers(1, 6),
    st.floats(0, 6),
)
def test_what_a_list_gives_are_the_best_of_all(
    seed, scope, temperature, listed, k, fewer, spread
):
    k = min(k, listed)
    pool, _ = pool_of([[[0.0] * SIZES[0], [0.0] * SIZES[1]], [[0.0] * SIZES[2]]])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(6, sum(SIZES), generator=generator, dtype=torch.float64)
    squares = (spread * draws).exp() * (draws > -1)  # zeros as well
    lots = Lots(pool.sizes, temperature, seed) if temperature else None
    everything = stream_of(squares, range(6))
    best = Entries.best(pool, everything, listed, scope, lots=lots)
    shortlist = Shortlist(best, 6, scope, lots)
    again = stream_of(squares, range(fewer), best.positions)
    found = shortlist.best(again, fewer, k)
    if found is not None:
        wanted = Entries.best(
            pool, stream_of(squares, range(fewer)), k, scope, lots=lots
        )
        for mine, theirs in zip(found.positions, wanted.positions, strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(found.scores, wanted.scores, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("score", "is_sure"), [(0.4, False), (0.5, False), (0.5003, False), (0.501, True)]
)
def test_a_list_knows_when_others_may_be_better(score, is_sure):
    pool, _ = pool_of([[[0.0] * 4]])
    means = torch.tensor([1.0, 0.5, 0.25, 0.25])  # over two samples
    best = Entries.best(pool, [(0, means)], 3, "global")
    now = torch.tensor([score, 0.25, 0.25])  # the fourth may have come to 0.5
    found = Shortlist(best, 2, "global", None).best([(0, now)], 1, 1)
    assert (found is not None) == is_sure
    if found is not None:
        assert found.positions[0].tolist() == [0]


@pytest.mark.parametrize("is_sure", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_all_candidates_are_ranked_only_where_the_list_is_not_sure(
    name, scope, is_sure, monkeypatch
):
    ranked = Counter()
    for method in ("fisher", "fisher_at"):
        plain = getattr(FisherEstimator, method)

        def counted(*args, plain=plain, method=method):
            ranked[method] += 1
            return plain(*args)

        monkeypatch.setattr(FisherEstimator, method, counted)
    if not is_sure:
        monkeypatch.setattr(Shortlist, "best", lambda *_: None)
    else:
        monkeypatch.setattr("peft_ird.selection.shortlist._ROUNDING", -1 + 1e-12)
    model, calibration, _ = problem(name)
    settings = config(name, density=0.01, schedule=CELLS, scope=scope)
    select_parameters(model, settings, calibration)
    has_bounds = scope != "balanced"
    assert ranked["fisher_at"] == (2 if is_sure else 1) * has_bounds
    assert ranked["fisher"] == 4 - 2 * (is_sure and has_bounds)
