import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ird.selection.topk import rank, shares, top_k
from tests import oracles

few_distinct = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40)


@given(few_distinct, st.data(), st.booleans())
def test_top_k_gives_ties_to_the_lower_position(scores, data, largest):
    k = data.draw(st.integers(0, len(scores)))
    found = top_k(torch.tensor(scores), k, largest=largest)
    assert found.tolist() == oracles.best(scores, k, largest)


def test_top_k_leaves_its_input_alone():
    scores = torch.tensor([3.0, 1.0, 3.0])
    top_k(scores, 1)
    assert scores.tolist() == [3.0, 1.0, 3.0]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.data())
def test_shares_add_up_and_stay_within_one_of_the_exact_part(sizes, data):
    total = sum(sizes)
    if total == 0:
        return
    k = data.draw(st.integers(0, total))
    parts = shares(sizes, k)
    assert sum(parts) == k
    assert parts == oracles.shares(sizes, k)
    for part, size in zip(parts, sizes, strict=True):
        assert part <= size
        assert abs(part - k * size / total) < 1


@given(few_distinct, st.data())
def test_rank_within_chooses_only_from_there(scores, data):
    inside = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    within = sorted(inside)
    k = data.draw(st.integers(0, len(within)))
    found = rank(
        torch.tensor(scores),
        k,
        bounds=[0, len(scores)],
        within=torch.tensor(within),
    )
    picks = oracles.best([scores[i] for i in within], k)
    assert found.tolist() == [within[i] for i in picks]


def test_rank_per_module_gives_each_group_its_share():
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    assert rank(scores, 4, bounds=[0, 4, 8]).tolist() == [0, 1, 6, 7]
    assert rank(scores, 4, bounds=[0, 8]).tolist() == [0, 1, 2, 3]
