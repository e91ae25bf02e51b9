import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_ird.sparse.delta import SparseDelta, check_indices, index_dtype
from peft_ird.sparse.ops import add_deltas, gather, scatter_, sum_dense
from tests import oracles
from tests.oracles import TOL


@st.composite
def deltas(draw, max_side=5):
    """A shape of one to three sides, and entries from none to all of it."""
    shape = draw(st.lists(st.integers(1, max_side), min_size=1, max_size=3))
    numel = torch.Size(shape).numel()
    chosen = draw(st.sets(st.integers(0, numel - 1)))
    if draw(st.booleans()):
        chosen = set(range(numel))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(len(chosen), generator=generator, dtype=torch.float64)
    indices = torch.tensor(sorted(chosen), dtype=torch.int32)
    return SparseDelta(indices, values, torch.Size(shape))


@given(deltas())
def test_add_deltas_equals_the_dense_sum(delta):
    weight = torch.randn(delta.shape, dtype=torch.float64)
    expected = weight + oracles.dense(delta.indices, delta.values, delta.shape)
    assert_close(add_deltas(weight, [delta]), expected, **TOL[torch.float64])


@given(deltas())
def test_add_deltas_of_zeros_keeps_every_bit(delta):
    weight = torch.randn(delta.shape)
    zeros = SparseDelta(delta.indices, torch.zeros(len(delta.values)), delta.shape)
    assert torch.equal(add_deltas(weight, [zeros]), weight)


@given(deltas())
def test_the_gradient_of_the_values_is_the_dense_one_at_their_indices(delta):
    values = delta.values.requires_grad_()
    weight = torch.randn(delta.shape, dtype=torch.float64)
    upstream = torch.randn(delta.shape, dtype=torch.float64)
    (add_deltas(weight, [delta]) * upstream).sum().backward()
    assert_close(values.grad, upstream.flatten()[delta.indices], **TOL[torch.float64])


def test_add_deltas_passes_gradcheck():
    indices = torch.tensor([0, 3, 5], dtype=torch.int32)
    weight = torch.randn(2, 3, dtype=torch.float64)
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def call(v):
        return add_deltas(weight, [SparseDelta(indices, v, weight.shape)]).sin()

    assert torch.autograd.gradcheck(call, (values,))


def test_sum_dense_adds_overlapping_deltas():
    shape = torch.Size([2, 2])
    a = SparseDelta(torch.tensor([0, 3]), torch.tensor([1.0, 2.0]), shape)
    b = SparseDelta(torch.tensor([3]), torch.tensor([5.0]), shape)
    assert sum_dense([a, b], torch.float32).tolist() == [[1.0, 0.0], [0.0, 7.0]]


@given(deltas(), st.booleans())
def test_scatter_then_gather_is_the_identity_in_any_layout(delta, transposed):
    tensor = torch.randn(delta.shape, dtype=torch.float64)
    if transposed:
        tensor = tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    before = tensor.clone()
    scatter_(tensor, delta.indices, delta.values)
    assert torch.equal(gather(tensor, delta.indices), delta.values)
    scatter_(tensor, delta.indices, gather(before, delta.indices))
    assert torch.equal(tensor, before)


def test_scatter_reaches_a_scalar():
    scalar = torch.tensor(1.0)
    scatter_(scalar, torch.tensor([0]), torch.tensor([4.0]))
    assert scalar.item() == 4.0
    assert gather(scalar, torch.tensor([0])).tolist() == [4.0]


def test_index_dtype_is_int32_as_long_as_it_fits():
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31 + 1) == torch.int64


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 12], r"must lie in \[0, 12\), got 0 to 12"),
        ([-1, 3], r"must lie in \[0, 12\)"),
        ([3, 3], "sorted and distinct"),
        ([5, 2], "sorted and distinct"),
        ([[1, 2]], "1-D integer"),
        ([0.5], "1-D integer"),
    ],
)
def test_bad_indices_are_refused_by_name(indices, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_indices(torch.tensor(indices), 12, "a.weight")
    assert "a.weight" in str(caught.value)
