"""On a CUDA device: the same selection and output as on the CPU."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from peft_ird import Calibration, IRDConfig, select_parameters
from peft_ird.adapter.targets import find_candidates
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed
from peft_ird.sparse import costs
from peft_ird.sparse.products import METHODS, available
from peft_ird.sparse.ways import WAYS, forced
from tests.conftest import make_batch, make_model, make_samples, task_type
from tests.oracles import TOL, product_entries

CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def config(name: str) -> IRDConfig:
    return IRDConfig(
        task_type=task_type(name), density=0.02, num_samples=8, initial_density=0.1,
        init_weights=False,
    )  # fmt: skip


def draw_values(model: nn.Module) -> None:
    """Give deltas values of about a tenth, always the same."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "irdelta" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)


def test_the_selection_is_that_of_the_cpu(name):
    data = make_samples(name)
    here = select_parameters(make_model(name).double(), config(name), data)
    there = select_parameters(make_model(name).double().cuda(), config(name), data)
    assert here.samples == there.samples
    assert here.counts == there.counts
    for module, parameters in here.indices.items():
        for parameter, indices in parameters.items():
            assert torch.equal(indices, there.indices[module][parameter])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_and_merges_as_on_the_cpu(name, dtype):
    settings = config(name)
    settings.calibration = make_samples(name)
    model = get_peft_model(make_model(name), settings).eval()
    draw_values(model)
    moved = copy.deepcopy(model).to("cuda", dtype)
    batch = make_batch(name)
    on_device = {k: v.cuda() for k, v in batch.items()}
    expected, output = model(**batch), moved(**on_device)
    assert_close(output.logits.cpu().float(), expected.logits, **TOL[dtype])
    output.loss.backward()
    values = [p for n, p in moved.named_parameters() if "irdelta" in n]
    assert all(p.grad.isfinite().all() for p in values)
    before = {n: p.clone() for n, p in moved.named_parameters()}
    moved.merge_adapter()
    moved.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in moved.named_parameters())


def test_an_adapter_is_loaded_onto_the_device(name, tmp_path):
    settings = config(name)
    settings.calibration = make_samples(name)
    model = get_peft_model(make_model(name), settings).eval()
    draw_values(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(name).cuda(), tmp_path).eval()
    batch = make_batch(name)
    found = loaded(**{key: value.cuda() for key, value in batch.items()}).logits
    assert_close(found.cpu(), model(**batch).logits, **TOL[torch.float32])


def fisher(model, name: str) -> torch.Tensor:
    pool = find_candidates(model, config(name))
    with borrowed(model):
        estimator = FisherEstimator(model, pool, Calibration(make_samples(name)))
        parts = [part.double().cpu() for _, part in estimator.fisher(range(12))]
    return torch.cat(parts)


def test_the_fisher_information_is_that_of_the_cpu(name):
    model = make_model(name).double()
    here, there = fisher(model, name), fisher(copy.deepcopy(model).cuda(), name)
    # Some norms and activations compute in float32 whatever the model's type.
    assert_close(there, here, rtol=1e-5, atol=1e-6 * float(here.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_has_float32_squares(name, dtype):
    model = make_model(name).to(dtype)
    exact = fisher(copy.deepcopy(model).double(), name)
    found = fisher(model.cuda(), name)
    large = exact > 0.01 * exact.max()
    assert ((found[large] / exact[large]).log().abs() < 0.3).all()
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.99


@pytest.mark.parametrize("tokens", [0, 1, 129, 3000])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("method", available(CUDA))
def test_entries_of_a_product_have_float32_sums(method, dtypes, tokens):
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(tokens, 2 * size, generator=generator).to(dtype)[:, ::2]
        for size, dtype in zip((70, 90), dtypes, strict=True)
    )
    places = (torch.rand(70 * 90, generator=generator) < 0.05).nonzero().flatten()
    if method != "triton" and not tokens:
        return  # nobody asks these
    for chosen in (places, places[:1]):
        there = left.cuda(), right.cuda(), chosen.cuda()
        found = METHODS[method](*there)
        assert found.dtype == torch.float32
        size = product_entries(left.abs(), right.abs(), chosen)
        error = (found.cpu() - product_entries(left, right, chosen)).abs()
        assert (error <= 1e-5 * size).all()
        if method == "triton":
            assert torch.equal(found, METHODS[method](*there))
            assert len(METHODS[method](*there[:2], there[2][:0])) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", available(CUDA))
def test_gradients_of_a_step_are_those_of_the_cpu(name, method, way):
    settings = config(name)
    settings.calibration = make_samples(name)
    model = get_peft_model(make_model(name), settings).eval()
    draw_values(model)
    moved, batch = copy.deepcopy(model).cuda(), make_batch(name)
    with forced(way=way, gradient="block"):
        model(**batch).loss.backward()
    with forced(way=way, gradient=method):
        moved(**{k: v.cuda() for k, v in batch.items()}).loss.backward()
    pairs = zip(model.parameters(), moved.parameters(), strict=True)
    trained = [(here, there) for here, there in pairs if here.grad is not None]
    assert trained
    for here, there in trained:
        assert_close(there.grad.cpu(), here.grad, **TOL[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["random", "fish"])
def test_a_step_in_low_precision_is_close_to_float64(name, dtype, method):
    settings = config(name)
    settings.method, settings.calibration = method, make_samples(name)
    model = get_peft_model(make_model(name), settings).eval()
    draw_values(model)
    moved, exact = copy.deepcopy(model).to("cuda", dtype), model.double()
    batch = make_batch(name)
    exact(**batch).loss.backward()
    moved(**{k: v.cuda() for k, v in batch.items()}).loss.backward()
    pairs = zip(exact.parameters(), moved.parameters(), strict=True)
    found = [(h.grad, t.grad.double().cpu()) for h, t in pairs if h.grad is not None]
    sides = zip(*found, strict=True)
    here, there = (torch.cat([g.flatten() for g in side]) for side in sides)
    assert torch.corrcoef(torch.stack([here, there]))[0, 1] > 0.99
    assert (there.norm() / here.norm()).log().abs() < 0.1


def test_an_adapter_may_move_to_the_gpu_and_back(name):
    settings = config(name)
    settings.calibration = make_samples(name)
    model, batch = get_peft_model(make_model(name), settings).eval(), make_batch(name)
    expected = model(**batch).logits
    model.cuda()
    there = model(**{k: v.cuda() for k, v in batch.items()}).logits
    assert_close(there.cpu(), expected, **TOL[torch.float32])
    assert torch.equal(model.cpu()(**batch).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_methods_have_a_price(dtype):
    found = costs.calibrated(CUDA, dtype)
    prices = {"sampled": found.sampled, "triton": found.triton}
    assert {name for name, price in prices.items() if price < float("inf")} == {
        name for name in available(CUDA) if name != "block"
    }
