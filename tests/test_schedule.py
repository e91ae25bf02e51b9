import pytest

from peft_ird.selection.schedule import PAPER, check_schedule, plan_cells


def plan(schedule, density, num_samples=128, initial_density=None, tolerance=0.0):
    return plan_cells(schedule, num_samples, initial_density, density, tolerance)


def test_halving_alternates_samples_and_density_and_clips_the_last():
    assert plan("halving", 0.01, 8, 0.08) == (
        (8, 0.08), (4, 0.08), (4, 0.04), (2, 0.04), (2, 0.02), (1, 0.02), (1, 0.01),
    )  # fmt: skip
    assert plan("halving", 0.03, 5, 0.04) == ((5, 0.04), (2, 0.04), (2, 0.03))


def test_halving_goes_on_with_the_density_once_one_sample_is_left():
    assert plan("halving", 0.1, 1, 0.4) == ((1, 0.4), (1, 0.2), (1, 0.1))


def test_halving_from_the_target_is_one_cell():
    assert plan("halving", 0.1, 16, 0.1) == ((16, 0.1),)


def test_halving_starts_at_the_papers_density_or_above_a_large_target():
    assert plan("halving", 0.001)[0] == (128, 0.025)
    assert plan("halving", 0.025)[0] == (128, 0.1)
    assert plan("halving", 0.5)[0] == (128, 1.0)


def test_paper_is_table_3_up_to_the_density_asked_for():
    assert plan("paper", 0.001) == PAPER[:5]
    assert plan("paper", 0.0002) == PAPER
    assert [(n, round(d * 100, 4)) for n, d in PAPER] == [
        (128, 2.5), (32, 2.5), (32, 0.5), (16, 0.5), (16, 0.1), (1, 0.1), (1, 0.02),
    ]  # fmt: skip


def test_paper_without_the_density_says_which_there_are():
    with pytest.raises(ValueError, match=r"0\.025, 0\.005, 0\.001, 0\.0002"):
        plan("paper", 0.003)


def test_a_list_is_walked_as_it_is():
    cells = [(6, 0.5), (3, 0.5), (3, 0.1)]
    assert plan(check_schedule(cells), 0.1) == tuple(cells)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "is empty"),
        ([(4, 0.1), (8, 0.1)], "must not grow"),
        ([(4, 0.1), (4, 0.2)], "must not grow"),
        ([(0, 0.1)], "num_samples >= 1"),
        ([(4, 1.5)], r"density in \(0, 1\]"),
        ([(4,)], "must be"),
        ("fast", "must be 'halving', 'paper' or a list"),
    ],
)
def test_a_bad_schedule_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule)


def test_a_list_that_ends_elsewhere_is_refused():
    with pytest.raises(ValueError, match="must meet the density"):
        plan([(8, 0.2), (4, 0.1)], 0.05)
    with pytest.raises(ValueError, match="must meet the density"):
        plan([(8, 0.2), (4, 0.1)], 0.2)


def test_a_start_below_the_target_is_refused():
    with pytest.raises(ValueError, match="must not be below"):
        plan("halving", 0.1, 8, 0.05)
