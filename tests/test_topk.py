import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_ird.selection import topk
from peft_ird.selection.ranking import Ranking, shares, top_k
from peft_ird.selection.topk import TopK
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


def test_top_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="`k` must be from 0 to the 2 available"):
        top_k(torch.zeros(2), 3)


# 1 + 2 ** -40 is 1 in float32
few_values = st.sampled_from([-2.0, 0.0, 1.0, 1.0 + 2.0**-40, 3.0])
streams = st.lists(st.lists(few_values, max_size=25), max_size=6)


@contextlib.contextmanager
def sizes_of(chunk: int, sample: int = 8) -> Iterator[None]:
    """Scan in chunks of that size, and sort samples of that many survivors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_CHUNK", chunk)
        patch.setattr(topk, "_ROW", 2)
        patch.setattr(topk, "_SAMPLE", sample)
        yield


def best_of_parts(
    parts: Sequence[Sequence[float]], k: int, largest: bool = True
) -> dict[int, list[int]]:
    """Concatenate, choose, and say in which part each choice is and where."""
    places = [
        (part, i) for part, scores in enumerate(parts) for i in range(len(scores))
    ]
    found: dict[int, list[int]] = {}
    for choice in oracles.best([s for part in parts for s in part], k, largest):
        part, position = places[choice]
        found.setdefault(part, []).append(position)
    return found


def check_winners(
    found: dict[int, tuple[Tensor, Tensor]],
    parts: Sequence[Tensor],
    k: int,
    **how: bool,
) -> None:
    """Compare positions with the oracle's, and scores bitwise with those offered."""
    expected = best_of_parts([part.tolist() for part in parts], k, **how)
    assert {part: where.tolist() for part, (where, _) in found.items()} == expected
    for part, (where, scores) in found.items():
        assert where.dtype == torch.int64
        torch.testing.assert_close(scores, parts[part][where], rtol=0, atol=0)


def select(parts: Sequence[Tensor], k: int, **how: bool) -> dict:
    best = TopK(k, **how)
    for part, scores in enumerate(parts):
        offered = scores.clone()
        best.update(part, offered)
        offered.fill_(99)  # whoever offers may use the memory again
    return best.finish()


@given(streams, st.data(), st.booleans(), st.integers(1, 30))
def test_a_stream_gives_the_top_k_of_the_concatenation(parts, data, largest, chunk):
    k = data.draw(st.integers(0, sum(map(len, parts))))
    offered = [torch.tensor(part, dtype=torch.float64) for part in parts]
    with sizes_of(chunk):
        found = select(offered, k, largest=largest)
    check_winners(found, offered, k, largest=largest)
    assert sum(len(where) for where, _ in found.values()) == k


@given(streams, st.data(), st.booleans())
def test_parts_of_several_dtypes_compare_exactly(parts, data, largest):
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
    offered = [torch.tensor(part, dtype=data.draw(dtypes)) for part in parts]
    k = data.draw(st.integers(0, sum(map(len, parts))))
    with sizes_of(3):
        found = select(offered, k, largest=largest)
    check_winners(found, offered, k, largest=largest)


def test_a_later_part_wins_by_less_than_its_own_resolution():
    above_one = torch.tensor([1.0 + 2.0**-40, 5.0, 5.0], dtype=torch.float64)
    parts = [above_one, torch.ones(1, dtype=torch.float32)]
    check_winners(select(parts, 1, largest=False), parts, 1, largest=False)


def many(kind: str) -> Tensor:
    drawn = torch.rand(6000, generator=torch.Generator().manual_seed(0))
    if kind == "ascending":  # everything passes every bound
        return drawn.sort().values
    if kind == "descending":
        return drawn.sort(descending=True).values
    if kind == "ties":
        return (4 * drawn).floor()
    if kind == "zeros":
        return torch.zeros_like(drawn)
    if kind == "periodic":  # a sample with stride sees extremes only
        return torch.where(torch.arange(6000) % 2 == 0, drawn + 1, -drawn)
    return drawn


KINDS = ("random", "ascending", "descending", "ties", "zeros", "periodic")


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 150, 2900, 5999])
def test_a_long_stream_gives_the_top_k_of_the_concatenation(kind, k, largest):
    parts = many(kind).split([1, 2600, 0, 700, 2699])
    with sizes_of(chunk=500, sample=256):
        found = select(parts, k, largest=largest)
    check_winners(found, parts, k, largest=largest)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_order_statistic_is_that_of_the_sorted_values(kind, sign):
    values = sign * many(kind)
    with sizes_of(chunk=1, sample=256):
        found = [topk._order_statistic(values, i).item() for i in range(1, 6001, 23)]
    assert found == values.sort().values[::23].tolist()


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Record how many candidates are held after each chunk."""
    counts: list[int] = []

    def watch(self, *arguments, hold=TopK._hold):
        hold(self, *arguments)
        counts.append(self._count)

    monkeypatch.setattr(TopK, "_hold", watch)
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [3, 200])
def test_two_k_candidates_and_a_chunk_are_held_at_most(held, kind, k, largest):
    with sizes_of(chunk=50, sample=64):
        select(many(kind).split(300), k, largest=largest)
    assert k < max(held) <= 2 * k + 50


def test_what_comes_below_k_held_candidates_is_not_held(held):
    with sizes_of(chunk=50):
        select(many("descending").split(1000), 200)
    assert held[:10] == [*range(50, 451, 50), 200]
    assert set(held[10:]) == {200}


def test_a_big_part_is_filtered_from_its_first_chunk(held):
    with sizes_of(chunk=500, sample=256):
        select([many("random")], 600)
    assert held[0] < 150  # about twice the 50 that win


def test_finishing_twice_gives_the_same_and_more_may_follow():
    best = TopK(2)
    best.update(3, torch.tensor([5.0, 1.0, 4.0]))
    first, second = best.finish(), best.finish()
    assert first[3][0].tolist() == second[3][0].tolist() == [0, 2]
    best.update(5, torch.tensor([4.0, 4.5]))
    assert {part: where.tolist() for part, (where, _) in best.finish().items()} == {
        3: [0],
        5: [1],
    }


def test_fewer_scores_than_k_all_win():
    found = select([torch.tensor([2.0, 1.0]), torch.empty(0)], 5)
    assert {part: where.tolist() for part, (where, _) in found.items()} == {0: [0, 1]}
    assert select([], 5) == {}


def test_wrong_parts_are_refused():
    best = TopK(1)
    best.update(4, torch.zeros(2))
    with pytest.raises(ValueError, match="`part` must ascend, got 4 after 4"):
        best.update(4, torch.zeros(2))
    with pytest.raises(ValueError, match=r"must be 1-D, got shape \(2, 1\)"):
        best.update(5, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="`k` must be 0 or more, got -1"):
        TopK(-1)


@given(streams, st.data(), st.booleans())
def test_ranking_gives_each_group_its_share(parts, data, largest):
    steps = st.lists(st.booleans(), min_size=len(parts), max_size=len(parts))
    new_group = data.draw(steps)
    groups = [sum(new_group[: i + 1]) for i in range(len(parts))]
    available = [len(part) for part in parts]
    k = data.draw(st.integers(0, sum(available)))
    ranking = Ranking(k, available, groups, largest=largest)
    for part, scores in enumerate(parts):
        ranking.update(part, torch.tensor(scores, dtype=torch.float64))
    found = ranking.finish()

    members = [[i for i, g in enumerate(groups) if g == group] for group in set(groups)]
    sizes = [sum(available[i] for i in group) for group in members]
    budgets = oracles.shares(sizes, k) if k else [0] * len(sizes)
    expected: list[list[int]] = [[] for _ in parts]
    for group, budget in zip(members, budgets, strict=True):
        winners = best_of_parts([parts[i] for i in group], budget, largest)
        for member, positions in winners.items():
            expected[group[member]] = positions
    assert [where.tolist() for where, _ in found] == expected
    for (where, scores), part in zip(found, parts, strict=True):
        assert where.dtype == torch.int64
        assert scores.dtype == torch.float64
        assert scores.tolist() == [part[i] for i in where]


def test_ranking_lets_a_part_with_nothing_available_out():
    ranking = Ranking(2, [0, 3], [0, 0])
    ranking.update(1, torch.tensor([1, 2, 3], dtype=torch.bfloat16))
    nothing, winners = ranking.finish()
    assert (nothing[0].dtype, nothing[1].dtype) == (torch.int64, torch.float32)
    assert len(nothing[0]) == len(nothing[1]) == 0
    assert (winners[0].tolist(), winners[1].dtype) == ([1, 2], torch.bfloat16)


def test_ranking_refuses_what_was_not_announced():
    with pytest.raises(ValueError, match="got 2 and 1"):
        Ranking(1, [1, 2], [0])
    with pytest.raises(ValueError, match="from 0 to the 3 available, got 4"):
        Ranking(4, [1, 2], [0, 0])
    ranking = Ranking(1, [1, 2], [0, 0])
    with pytest.raises(ValueError, match=r"of part 1 must have shape \(2,\)"):
        ranking.update(1, torch.zeros(3))
    ranking.update(0, torch.zeros(1))
    with pytest.raises(ValueError, match="Part 1 was not offered"):
        ranking.finish()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_winners_on_a_gpu_stay_there():
    parts = [part.cuda() for part in many("ties").split(2000)]
    with sizes_of(chunk=500, sample=256):
        found = select(parts, 1700)
    assert all(t.is_cuda for pair in found.values() for t in pair)
    check_winners(found, parts, 1700)


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
