"""Choices of entries against sorting everything."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_ird.selection.entries import SCOPES, Entries
from peft_ird.selection.lots import Lots
from peft_ird.selection.pool import Pool
from tests import oracles

# Modules with one or two parameters; a few distinct scores, so that ties abound.
modules = st.lists(
    st.lists(
        st.lists(st.integers(0, 4).map(float), min_size=1, max_size=9),
        min_size=1,
        max_size=2,
    ),
    min_size=1,
    max_size=4,
)


def pool_of(tree) -> tuple[Pool, list[torch.Tensor]]:
    named = [
        (f"m{m}", f"p{p}", torch.tensor(scores))
        for m, parameters in enumerate(tree)
        for p, scores in enumerate(parameters)
    ]
    pool = Pool((m, p, nn.Parameter(scores)) for m, p, scores in named)
    return pool, [scores for _, _, scores in named]


def flat(entries: Entries) -> list[int]:
    starts = accumulate([0, *entries.pool.sizes])
    parts = zip(starts, entries.positions, strict=False)
    return [start + int(i) for start, positions in parts for i in positions]


def expected(tree, k, scope, inside=None, largest=True) -> list[int]:
    """Sort all entries of each group, one by one."""
    groups = [[s for scores in parameters for s in scores] for parameters in tree]
    if scope == "balanced":
        groups = [balanced(group, inside, groups, i) for i, group in enumerate(groups)]
    scores = [s for group in groups for s in group]
    bounds = [0, *accumulate(map(len, groups))]
    if scope != "per_module":
        bounds = [0, len(scores)]
    inside = range(len(scores)) if inside is None else inside
    members = [[i for i in inside if low <= i < high] for low, high in pairwise(bounds)]
    budgets = oracles.shares([len(each) for each in members], k)
    chosen = []
    for each, budget in zip(members, budgets, strict=True):
        picks = oracles.best([scores[i] for i in each], budget, largest)
        chosen += [each[i] for i in picks]
    return chosen


def balanced(group, inside, groups, number) -> list[float]:
    start = sum(map(len, groups[:number]))
    counted = [
        s for i, s in enumerate(group) if inside is None or start + i in set(inside)
    ]
    mean = sum(counted) / max(1, len(counted))
    # Divided in float32, as ties depend on the rounding.
    return [(torch.tensor(s) / mean).item() if mean > 0 else s for s in group]


@pytest.mark.parametrize("scope", SCOPES)
@given(tree=modules, data=st.data())
def test_the_best_entries_are_those_of_a_full_sort(scope, tree, data):
    pool, scores = pool_of(tree)
    k = data.draw(st.integers(1, len(pool)))
    entries = Entries.best(pool, enumerate(scores), k, scope)
    assert flat(entries) == expected(tree, k, scope)
    assert len(entries) == k


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@given(tree=modules, data=st.data())
def test_the_best_of_chosen_entries_come_from_them(scope, largest, tree, data):
    pool, scores = pool_of(tree)
    first = data.draw(st.integers(1, len(pool)))
    second = data.draw(st.integers(1, first))
    entries = Entries.best(pool, enumerate(scores), first)
    others = [(7 * s + 3) % 5 for s in scores]
    stream = [
        (part, other[positions])
        for part, (other, positions) in enumerate(
            zip(others, entries.positions, strict=True)
        )
        if positions.numel()
    ]
    fewer = entries.best_of(stream, second, scope, largest=largest)
    other_tree = [[[(7 * s + 3) % 5 for s in p] for p in m] for m in tree]
    found = expected(other_tree, second, scope, flat(entries), largest)
    assert flat(fewer) == found


@pytest.mark.parametrize("scope", SCOPES)
@given(tree=modules, data=st.data())
def test_fewer_entries_by_the_same_scores_are_the_best_ones(scope, tree, data):
    pool, scores = pool_of(tree)
    first = data.draw(st.integers(1, len(pool)))
    second = data.draw(st.integers(1, first))
    entries = Entries.best(pool, enumerate(scores), first, scope)
    fewer = entries.fewer(second, scope)
    if fewer is None:  # a module's share grew while the budget shrank
        assert scope == "per_module"
        sizes = [sum(map(len, parameters)) for parameters in tree]
        before, after = (oracles.shares(sizes, k) for k in (first, second))
        assert any(a > b for a, b in zip(after, before, strict=True))
    else:
        assert flat(fewer) == expected(tree, second, scope)


def test_the_share_that_two_choices_have_in_common():
    pool, scores = pool_of([[[3.0, 2.0, 1.0, 0.0]], [[9.0, 0.0]]])
    three = Entries.best(pool, enumerate(scores), 3)
    reverse = Entries.best(pool, enumerate([-s for s in scores]), 4)
    assert flat(three) == [0, 1, 4]
    assert flat(reverse) == [1, 2, 3, 5]
    assert three.shared_with(reverse) == pytest.approx(1 / 3)
    assert reverse.shared_with(three) == pytest.approx(1 / 4)
    assert three.shared_with(three) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_entries_are_drawn_by_the_power_of_their_scores(temperature):
    pool, scores = pool_of([[[4.0, 1.0], [9.0]], [[0.0, 2.0]]])
    draws = 4000
    counts = [0] * len(pool)
    for seed in range(draws):
        lots = Lots(pool.sizes, temperature, seed)
        chosen = Entries.best(pool, enumerate(scores), 2, lots=lots)
        for place in flat(chosen):
            counts[place] += 1
    weights = [s ** (1 / temperature) for part in scores for s in part.tolist()]
    wanted = oracles.inclusion_probabilities(weights, 2)
    assert [c / draws for c in counts] == pytest.approx(wanted, abs=0.03)
    assert counts[3] == 0  # of no weight


@pytest.mark.parametrize("temperature", [1e-4, 1.0, 50.0])
def test_chance_decides_between_entries_of_no_weight(temperature):
    pool, scores = pool_of([[[1e-30, 0.0, 0.0, 0.0]]])
    counts = [0] * 4
    for seed in range(600):
        lots = Lots(pool.sizes, temperature, seed)
        for place in flat(Entries.best(pool, enumerate(scores), 2, lots=lots)):
            counts[place] += 1
    assert counts[0] == 600
    assert [c / 600 for c in counts[1:]] == pytest.approx([1 / 3] * 3, abs=0.08)


def test_the_smallest_are_drawn_by_the_inverse_power():
    pool, scores = pool_of([[[1.0, 2.0, 4.0]]])
    everything = Entries.best(pool, enumerate(scores), 3)
    counts = [0] * 3
    for seed in range(4000):
        lots = Lots(pool.sizes, 1.0, seed)
        inside = enumerate(scores)
        (place,) = flat(everything.best_of(inside, 1, "global", False, lots))
        counts[place] += 1
    assert [c / 4000 for c in counts] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e20])
def test_a_low_temperature_takes_the_largest_at_any_scale(scale):
    pool, scores = pool_of([[(scale * torch.rand(50).add(0.01)).tolist()], [[0.0]]])
    lots = Lots(pool.sizes, 1e-4, 0)
    drawn = Entries.best(pool, enumerate(scores), 10, lots=lots)
    assert flat(drawn) == flat(Entries.best(pool, enumerate(scores), 10))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_smaller_draw_by_the_same_scores_is_part_of_the_larger_one(scope):
    tree = [
        [torch.rand(30).tolist(), torch.rand(5).tolist()],
        [torch.rand(40).tolist()],
    ]
    pool, scores = pool_of(tree)
    lots = Lots(pool.sizes, 1.0, 3)
    many, few = (
        Entries.best(pool, enumerate(scores), k, scope, lots=lots) for k in (30, 10)
    )
    assert set(flat(few)) < set(flat(many))
    assert flat(many.fewer(10, scope)) == flat(few)
    inside = [scores[i][p] for i, p in enumerate(many.positions)]
    again = many.best_of(enumerate(inside), 10, scope, lots=lots)
    if scope != "balanced":  # whose means are over the entries that are left
        assert flat(again) == flat(few)
