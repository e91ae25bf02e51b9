"""Options that change which samples and entries win, against brute force."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ird import Calibration, IRDConfig, select_parameters
from peft_ird.selection import fisher
from peft_ird.selection.sampling import with_sampled_labels
from tests import oracles
from tests.conftest import as_batch, make_samples, task_type
from tests.test_selection import candidate_names, config, flat, problem


def sizes_by_module(model) -> list[int]:
    sizes: dict[str, int] = {}
    for name in candidate_names(model):
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + model.get_parameter(name).numel()
    return list(sizes.values())


def test_a_larger_pool_is_ranked_by_all_candidates_before_anything_else(name):
    model, calibration, gradients = problem(name)
    options = {"budget": 40, "method": "fish", "num_samples": 5}
    selection = select_parameters(
        model, config(name, num_ranked_samples=12, **options), calibration
    )
    squares = gradients.square()
    samples = oracles.best(squares.sum(1).tolist(), 5)
    assert list(selection.first_samples) == samples
    expected = oracles.best(squares[samples].mean(0).tolist(), 40)
    assert flat(selection, model) == expected


def test_reverse_starts_from_the_samples_of_the_smallest_scores(name):
    model, calibration, gradients = problem(name)
    settings = config(
        name, density=0.05, method="reverse_ird", num_samples=5, num_ranked_samples=12
    )
    selection = select_parameters(model, settings, calibration)
    scores = gradients.square().sum(1).tolist()
    assert list(selection.first_samples) == oracles.best(scores, 5, largest=False)


def test_the_pool_is_drawn_by_the_seed_and_ranked_for_gradients_too():
    model, calibration, gradients = problem("bert")
    settings = config(
        "bert", budget=9, method="gradient", num_samples=3, num_ranked_samples=12
    )
    selection = select_parameters(model, settings, calibration)
    samples = oracles.best(gradients.square().sum(1).tolist(), 3)
    assert list(selection.samples) == samples
    expected = oracles.best(gradients[samples].mean(0).abs().tolist(), 9)
    assert flat(selection, model) == expected


def test_more_ranked_samples_than_there_are():
    model, calibration, _ = problem("bert")
    settings = config("bert", density=0.1, num_samples=4, num_ranked_samples=13)
    with pytest.raises(ValueError, match=r"`num_ranked_samples` is 13.*has 12"):
        select_parameters(model, settings, calibration)


def losses_alone(model, name) -> list[float]:
    samples = [as_batch(sample) for sample in make_samples(name)]
    with torch.no_grad():
        return [model(**batch).loss.item() for batch in samples]


@pytest.mark.parametrize("trim", [0.0, 0.2])
@pytest.mark.parametrize("scaling", ["none", "length", "loss"])
def test_sample_scores_are_scaled_and_trimmed(name, scaling, trim, monkeypatch):
    monkeypatch.setattr(fisher, "_FEW_TOKENS", math.inf)
    model, calibration, gradients = problem(name)
    cells = [(12, 0.05), (4, 0.05)]
    settings = config(
        name, density=0.05, schedule=cells, sample_scaling=scaling, trim_samples=trim
    )
    selection = select_parameters(model, settings, calibration)
    squares = gradients.square()
    first = oracles.best(squares.mean(0).tolist(), round(0.05 * squares.shape[1]))
    scores = squares[:, first].sum(1)
    if scaling == "length":
        scores /= torch.tensor([len(s["input_ids"]) for s in make_samples(name)])
    if scaling == "loss":
        scores /= torch.tensor(losses_alone(model, name)).square()
    outliers = oracles.best(scores.tolist(), int(trim * 12))
    inliers = [n for n in range(12) if n not in outliers]
    picks = oracles.best(scores[inliers].tolist(), 4)
    assert list(selection.samples) == [inliers[i] for i in picks]
    torch.testing.assert_close(
        selection.sample_scores, scores[list(selection.samples)].double()
    )


@pytest.mark.parametrize("method", ["ird", "reverse_ird", "gradient", "magnitude"])
def test_a_draw_has_the_size_asked_for_and_depends_on_the_seed(method):
    model, calibration, _ = problem("bert")
    options = {"budget": 60, "method": method, "num_samples": 12}

    def drawn(temperature, seed=0):
        settings = config("bert", temperature=temperature, seed=seed, **options)
        return flat(select_parameters(model, settings, calibration), model)

    assert len(drawn(2.0)) == 60
    assert drawn(2.0) == drawn(2.0)
    assert drawn(2.0) != drawn(2.0, seed=1)
    shared = [len({*drawn(0.0)} & {*drawn(t)}) for t in (0.1, 1.0, 1e6)]
    assert 60 > shared[0] > shared[1] > shared[2]


def test_trimming_leaves_the_samples_asked_for():
    model, calibration, _ = problem("bert")
    settings = config(
        "bert", density=0.05, schedule=[(12, 0.05), (10, 0.05)], trim_samples=0.9
    )
    assert len(select_parameters(model, settings, calibration).samples) == 10


def test_balanced_scores_are_divided_by_their_modules_mean(name):
    model, calibration, gradients = problem(name)
    options = {"budget": 50, "method": "fish", "num_samples": 12, "scope": "balanced"}
    selection = select_parameters(model, config(name, **options), calibration)
    pieces = gradients.square().mean(0).split(sizes_by_module(model))
    scaled = torch.cat([piece / piece.mean() for piece in pieces])
    assert flat(selection, model) == oracles.best(scaled.tolist(), 50)


def warmed(model, samples, steps: int, rate: float):
    """Adam on the head, every sample in every step, one sample at a time."""
    model = copy.deepcopy(model)
    head = list(model.classifier.parameters())
    optimizer = torch.optim.Adam(head, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        for sample in samples:
            (model(**as_batch(sample)).loss / len(samples)).backward()
        optimizer.step()
    return model


def mean_by_hand(model, batch):
    chances = model(**{**batch, "labels": None}).logits.log_softmax(-1)
    return -chances.gather(1, batch["labels"][:, None]).mean()


@pytest.mark.parametrize("loss", [None, mean_by_hand])
def test_the_warm_up_trains_the_head_for_the_gradients_alone(loss):
    model, _, cold = problem("bert")
    # Not used by the loss, and no reason to fail.
    model.classifier.spare = nn.Parameter(torch.zeros(1))
    samples = make_samples("bert")
    calibration = Calibration(samples, loss=loss)
    before = copy.deepcopy(model.state_dict())
    model.classifier.bias.grad = torch.ones_like(model.classifier.bias)
    settings = config(
        "bert", budget=60, method="fish", num_samples=12, head_warmup_steps=7,
        head_warmup_learning_rate=0.3,
    )  # fmt: skip
    selection = select_parameters(model, settings, calibration)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.classifier.weight.grad is None
    assert torch.equal(model.classifier.bias.grad, torch.ones(2).double())
    warm_model = warmed(model, samples, 7, 0.3)
    warm = oracles.sample_gradients(
        warm_model, [as_batch(s) for s in samples], candidate_names(model)
    )
    expected = oracles.best(warm.square().mean(0).tolist(), 60)
    assert flat(selection, model) == expected
    assert expected != oracles.best(cold.square().mean(0).tolist(), 60)


def test_the_warm_up_learns_from_the_data_and_labels_are_drawn_after_it():
    model, calibration, _ = problem("bert")
    settings = config("bert", budget=60, method="fish", num_samples=12, seed=3,
                      fisher="sampled", head_warmup_steps=7,
                      head_warmup_learning_rate=0.3)  # fmt: skip
    samples = make_samples("bert")
    warm = warmed(model, samples, 7, 0.3)
    drawn = [
        with_sampled_labels(
            as_batch(sample), warm,
            torch.Generator().manual_seed(hash((3, n)) & (2**63 - 1)),
        )
        for n, sample in enumerate(samples)
    ]  # fmt: skip
    labels = [batch["labels"].item() for batch in drawn]
    assert labels != [sample["labels"] for sample in samples]
    gradients = oracles.sample_gradients(warm, drawn, candidate_names(model))
    selection = select_parameters(model, settings, calibration)
    assert flat(selection, model) == oracles.best(gradients.square().mean(0), 60)


def test_the_warm_up_of_a_second_adapter_trains_the_models_own_head():
    settings = config("bert", budget=60, method="fish", num_samples=12,
                      head_warmup_steps=7, head_warmup_learning_rate=0.3)  # fmt: skip
    model, calibration, _ = problem("bert")
    plain = copy.deepcopy(model)
    expected = flat(select_parameters(plain, settings, calibration), plain)
    first = config("bert", density=0.1, method="random", num_samples=12)
    adapted = get_peft_model(model, first)
    head = adapted.base_model.model.classifier
    with torch.no_grad():
        head.modules_to_save["default"].weight.normal_()
    before = copy.deepcopy(adapted.state_dict())
    found = select_parameters(adapted, settings, calibration)
    assert flat(found, plain) == expected
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def test_the_head_comes_back_when_the_selection_fails():
    model, _, _ = problem("bert")
    data = make_samples("bert")
    data[5] = {**data[5], "labels": 9}
    before = copy.deepcopy(model.state_dict())
    settings = config("bert", density=0.1, num_samples=12, head_warmup_steps=3)
    with pytest.raises(ValueError, match="calibration sample 5"):
        select_parameters(model, settings, data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_a_warm_up_without_a_head():
    model, calibration, _ = problem("llama")
    assert task_type("llama") == "CAUSAL_LM"
    settings = config("llama", density=0.1, num_samples=4, head_warmup_steps=3)
    with pytest.raises(ValueError, match="`head_warmup_steps` needs a head"):
        select_parameters(model, settings, calibration)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranked_samples": 0}, "`num_ranked_samples` must be a whole number"),
        ({"head_warmup_steps": -1}, "`head_warmup_steps` must be a whole number"),
        ({"trim_samples": 1.0}, r"`trim_samples` must lie in \[0, 1\)"),
        ({"temperature": -0.1}, "`temperature` must be 0 or more, and finite"),
        ({"temperature": float("inf")}, "`temperature` must be 0 or more"),
        ({"sample_scaling": "size"}, "`sample_scaling` must be one of 'none'"),
        ({"memory_limit": 0}, "`memory_limit` must be a whole number"),
        ({"head_warmup_learning_rate": 0.0}, "`head_warmup_learning_rate` must"),
        ({"seed": None}, "`seed` must be a whole number, got None"),
        ({"seed": 0.5}, "`seed` must be a whole number, got 0.5"),
        ({"modules_to_save": "head"}, r"must be a list of names, got 'head'"),
        ({"schedule": [(4, "0.1")]}, "Each cell of `schedule` must be"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        IRDConfig(density=0.1, **options)


def test_the_memory_limit_is_kept_at_run_time_only():
    settings = IRDConfig(density=0.1, memory_limit=1 << 30)
    assert "memory_limit" not in settings.to_dict()
