"""When Triton may compute the gradient of the values, and that its kernel is right."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peft_ird.sparse import costs, products
from peft_ird.sparse.costs import Costs
from peft_ird.sparse.ways import forced
from tests.oracles import TOL
from tests.test_sparse_linear import adapted

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.fixture(params=[False, True], ids=["compiled", "interpreted"])
def pretended(monkeypatch, request) -> bool:
    """Triton, as far as can be seen; whether it is interpreted."""
    kernels = SimpleNamespace(IS_INTERPRETED=request.param, entries=products.by_block)
    monkeypatch.setattr(products, "has_triton", lambda: True)
    monkeypatch.setattr("peft_ird.sparse.ways.has_triton", lambda: True)
    monkeypatch.setattr(products, "_kernels", lambda: kernels)
    return request.param


@pytest.mark.usefixtures("absent")
def test_without_triton_there_is_no_such_method():
    assert not products.has_triton()
    assert products.available(CPU) == products.available(CUDA) == ("block", "sampled")
    with pytest.raises(ValueError, match='`gradient="triton"` needs the package'):
        forced(gradient="triton").__enter__()
    with pytest.raises(ValueError, match="Triton does not compute on cpu"):
        products.by_triton(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0]))


def test_triton_takes_a_gpu_or_its_interpreter(pretended):
    assert "triton" in products.available(CUDA)
    assert ("triton" in products.available(CPU)) == pretended


def test_what_is_forced_is_computed_by_the_kernel(pretended):
    torch.manual_seed(0)
    model, x = adapted(nn.Linear(8, 6)), torch.randn(5, 8)
    values = model.base_model.model[0].irdelta_values["default"]["weight"]
    model(x).square().sum().backward()
    expected, values.grad = values.grad, None
    with forced(gradient="triton"):
        loss = model(x).square().sum()
    if pretended:
        loss.backward()
        assert_close(values.grad, expected, **TOL[torch.float32])
    else:
        with pytest.raises(ValueError, match="Triton does not compute on cpu"):
            loss.backward()


def test_the_kernel_is_chosen_where_it_is_the_cheapest(monkeypatch):
    known = {
        CPU: Costs(sampled=8.0, moved=100.0),
        CUDA: Costs(sampled=512.0, moved=16.0, triton=64.0),
    }
    monkeypatch.setattr(costs, "calibrated", lambda device, _: known[device])
    whole = (1000, 1000)
    assert costs.cheapest(whole, 5_000, CPU, torch.float32) == "sampled"
    assert costs.cheapest(whole, 5_000, CUDA, torch.float32) == "block"  # it is small
    large = (8000, 2000)
    assert costs.cheapest(large, 80_000, CUDA, torch.float32) == "triton"
    assert costs.cheapest(large, 400_000, CUDA, torch.float32) == "block"
    assert costs.cheapest((1000, 800), 5_000, CUDA, torch.float32) == "block"


@pytest.mark.usefixtures("pretended")
def test_the_kernel_is_not_even_timed_on_the_cpu(monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setitem(products.METHODS, "triton", fail)
    found = costs.calibrated.__wrapped__(CPU, torch.float32)
    assert math.isinf(found.triton)
    assert math.isfinite(found.sampled)


def test_a_method_that_fails_when_it_is_timed_is_not_chosen(monkeypatch):
    def fail(*_):
        raise RuntimeError("not implemented")

    monkeypatch.setitem(products.METHODS, "sampled", fail)
    prices = costs.calibrated.__wrapped__(CPU, torch.float32)
    assert math.isinf(prices.sampled)
    monkeypatch.setattr(costs, "calibrated", lambda *_: prices)
    assert costs.cheapest((1000, 1000), 1, CPU, torch.float32) == "block"


def test_half_precision_factors_are_priced_as_such(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "peft_ird.sparse.support.cheapest",
        lambda *given: seen.append(given[-1]) or "block",
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        adapted(nn.Linear(4, 4).to(dtype))
        assert set(seen) == {dtype}
        seen.clear()


@pytest.mark.slow
def test_the_interpreted_kernel_is_right():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "tests/interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("generation", [75, 80, 90])
@pytest.mark.parametrize("given", ["bf16", "fp16", "fp32", "fp64"])
def test_the_kernel_compiles_to_loads_of_sixteen_bytes(
    given, generation, monkeypatch, tmp_path
):
    triton = pytest.importorskip("triton")
    kernels = products._kernels()
    if kernels.IS_INTERPRETED:
        pytest.skip("is interpreted")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    summed = "*fp64" if given == "fp64" else "*fp32"
    types = {
        "rows": f"*{given}", "columns": f"*{given}", "places": "*i64", "sums": summed,
        "k": "i32", "width": "i32", "tokens": "i32",
    }  # fmt: skip
    sizes = {"CHUNK": kernels._CHUNK, "ENTRIES": kernels._ENTRIES,
             "TOKENS": kernels._TOKENS}  # fmt: skip
    # As a launch would find out: all but k and width are multiples of 16.
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 6)}
    source = triton.compiler.ASTSource(
        kernels._kernel, types | dict.fromkeys(sizes, "constexpr"), sizes, aligned
    )
    target = triton.backends.compiler.GPUTarget("cuda", generation, 32)
    code = triton.compile(source, target=target).asm["ptx"]
    loads = set(re.findall(r"ld\.global[.\w:]*", code)) - {"ld.global.b64"}
    assert loads == {"ld.global.v2.b64" if given == "fp64" else "ld.global.v4.b32"}
