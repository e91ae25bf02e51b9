"""Sorted indices in few bytes against a loop over bits."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_ird.sparse.coding import (
    coded_size,
    decode,
    encode,
    is_blank,
    pack,
    packed_size,
    unpack,
)
from tests import oracles


@st.composite
def sets_of_indices(draw):
    """Any share of a small tensor, few of a huge one, scattered or in one cluster."""
    numel = draw(st.one_of(st.integers(1, 300), st.sampled_from([2**31, 2**33])))
    if numel > 300:
        k = draw(st.integers(0, 6))
    else:
        k = draw(st.one_of(st.integers(0, numel), st.sampled_from([0, 1, numel])))
    if draw(st.booleans()):
        start = draw(st.integers(0, numel - k))
        return list(range(start, start + k)), numel
    found = st.sets(st.integers(0, numel - 1), min_size=k, max_size=k)
    return sorted(draw(found)), numel


@settings(max_examples=200)
@given(sets_of_indices())
@example(([0, 2**31 - 1], 2**31))
@example(([2**33 - 1], 2**33))
def test_the_code_is_that_of_the_loop_and_can_be_decoded(problem):
    indices, numel = problem
    tensor = torch.tensor(indices, dtype=torch.int64)
    coded = encode(tensor, numel)
    assert coded.dtype == torch.uint8
    assert len(coded) == coded_size(len(indices), numel)
    if numel <= 300:
        assert bytes(coded.tolist()) == oracles.coded_indices(indices, numel)
    bits = [byte >> place & 1 for byte in coded.tolist() for place in range(8)]
    assert oracles.decoded_indices(bits, len(indices), numel)[0] == indices
    found = decode(coded, len(indices), numel)
    assert found.tolist() == indices
    assert found.dtype == (torch.int32 if numel < 2**31 else torch.int64)


@given(st.lists(sets_of_indices(), max_size=4))
def test_a_module_is_the_codes_of_its_parameters(problems):
    named = {f"p{i}": problem for i, problem in enumerate(problems)}
    indices = {name: torch.tensor(found).long() for name, (found, _) in named.items()}
    numels = {name: numel for name, (_, numel) in named.items()}
    counts = {name: len(found) for name, (found, _) in named.items()}
    packed = pack(indices, numels)
    assert len(packed) == packed_size(counts, numels)
    assert not is_blank(packed)
    back = unpack(packed, counts, "module")
    assert {n: (at.tolist(), numel) for n, (at, numel) in back.items()} == named
    assert oracles.decoded_module(bytes(packed.tolist()), numels, counts) == {
        name: found for name, (found, _) in named.items()
    }


def test_a_thousandth_takes_twelve_bits():
    assert coded_size(590, 589_824) * 8 / 590 < 12
    assert coded_size(10_000_000, 2**33) * 8 / 10_000_000 < 2 + 9.8


def test_more_than_half_takes_a_bit_per_position():
    assert coded_size(600, 1000) == 125
    assert coded_size(1000, 1000) == 0


@given(sets_of_indices(), st.data())
def test_a_changed_bit_never_gives_indices_that_break_the_rules(problem, data):
    indices, numel = problem
    coded = encode(torch.tensor(indices).long(), numel)
    if len(coded) == 0:
        return
    at = data.draw(st.integers(0, len(coded) - 1))
    coded[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decode(coded, len(indices), numel).tolist()
    except ValueError:
        return
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] < numel


@pytest.mark.parametrize(
    ("indices", "message"),
    [([3, 2], "sorted and distinct"), ([2, 2], "sorted"), ([1, 10], r"\[0, 10\)")],
)
def test_other_indices_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        encode(torch.tensor(indices), 10)


def test_a_code_of_another_size_is_refused():
    coded = encode(torch.tensor([1, 5]), 10)
    with pytest.raises(ValueError, match="of 2 indices below 10 has 1 bytes, got"):
        decode(torch.cat([coded, coded]), 2, 10)
    packed = pack({"weight": torch.tensor([1, 5])}, {"weight": 10})
    with pytest.raises(ValueError, match=r"2 indices of 'a\.weight' cannot be decoded"):
        unpack(packed[:-1], {"weight": 2}, "a")
    with pytest.raises(ValueError, match="indices of 'a' should take 9 bytes, got 10"):
        unpack(torch.cat([packed, coded]), {"weight": 2}, "a")
    with pytest.raises(ValueError, match="cannot lie in a tensor of 10 entries"):
        unpack(packed, {"weight": 11}, "a")


def test_room_for_a_code_is_told_from_every_code():
    assert is_blank(torch.full((packed_size({"a": 3}, {"a": 9}),), 255).byte())
    everything = pack({"a": torch.arange(8)}, {"a": 8})
    assert not is_blank(everything)
