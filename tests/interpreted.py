"""The Triton kernel in Triton's interpreter, on the CPU; `test_triton.py` runs this.

Triton reads TRITON_INTERPRET when it is imported, so this takes a process of its own.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_ird.sparse import costs, triton_ops
from peft_ird.sparse.products import available, by_triton
from peft_ird.sparse.separate import plus_product
from peft_ird.sparse.ways import WAYS
from tests import oracles
from tests.oracles import TOL
from tests.test_sparse_linear import gradients, problems, some_layout

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = st.sampled_from(["plain", "transposed", "strided"])


@st.composite
def products(draw):
    """Two factors, in types and layouts of their own, and places in their product."""
    t = draw(st.sampled_from([0, 1, 5, 127, 128, 129, 512, 513, 700, 1024]))
    r, c = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    share = draw(st.sampled_from([0, 0.1, 0.5, 1]))
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        some_layout(torch.randn(t, size, generator=generator).to(dtype), layout)
        for size, dtype, layout in (
            (size, draw(st.sampled_from(DTYPES)), draw(LAYOUTS)) for size in (r, c)
        )
    )
    places = (torch.rand(r * c, generator=generator) < share).nonzero().flatten()
    return left, right, places


def test_it_is_interpreted_and_may_be_forced_here():
    assert triton_ops.IS_INTERPRETED
    assert "triton" in available(CPU)
    assert costs.calibrated(CPU, torch.float32).triton == float("inf")


@given(products())
def test_entries_are_those_of_the_loop(problem):
    left, right, places = problem
    found = by_triton(left, right, places)
    both_double = torch.float64 in {left.dtype, right.dtype}
    assert found.dtype == (torch.float64 if both_double else torch.float32)
    expected = oracles.product_entries(left, right, places)
    # Whatever the factors' type, sums are float32's: of their size, not the result's.
    size = oracles.product_entries(left.abs(), right.abs(), places)
    bound = 1e-5 if found.dtype == torch.float32 else 1e-14
    assert ((found - expected).abs() <= bound * size).all()
    assert torch.equal(found, by_triton(left, right, places))


@given(problems(), st.sampled_from(WAYS))
def test_gradients_are_the_dense_ones(problem, way):
    inputs = [problem.x, problem.delta.values]
    mine = gradients(problem.sparse(way, "triton"), inputs)
    theirs = gradients(problem.dense(problem.delta.values), inputs)
    for found, expected in zip(mine, theirs, strict=True):
        assert_close(found, expected, **TOL[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(problems(dtype=torch.float32))
def test_a_low_precision_input_has_float32_gradients(dtype, problem):
    delta = problem.delta
    support = replace(delta.support, gradient="triton")
    x = problem.x.detach().to(dtype)
    o = problem.weight.shape[1 if problem.is_transposed else 0]
    y = torch.zeros(*x.shape[:-1], o, dtype=dtype, requires_grad=True)
    moved = replace(delta, support=support)
    out = plus_product(y, x, moved, problem.is_transposed)
    (found,) = torch.autograd.grad(out.float().sum(), delta.values)
    sums = x.double().reshape(-1, x.shape[-1]).sum(0)
    inputs = delta.indices // problem.weight.shape[1]
    if not problem.is_transposed:
        inputs = delta.indices % problem.weight.shape[1]
    assert found.dtype == torch.float32
    assert_close(found.double(), sums[inputs.long()], **TOL[torch.float32])
