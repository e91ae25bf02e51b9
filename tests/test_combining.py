"""Adapters made into one."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import ties
from torch import nn
from torch.testing import assert_close

from peft_ird import IRDConfig
from peft_ird.adapter.combining import RULES
from peft_ird.adapter.modules import layers_of
from tests.conftest import make_batch, make_model
from tests.oracles import TOL, combined_entries

WEIGHTS = [0.7, -1.5, 0.4]
ADAPTERS = ["one", "two", "three"]


def with_three(name: str, dtype: torch.dtype = torch.float64) -> PeftModel:
    """Three adapters that share some entries, the last one in one kind of module."""
    torch.manual_seed(0)
    # As feature extraction they have no heads, which cannot be combined.
    options = {"method": "random", "density": 0.3, "init_weights": False}
    model = get_peft_model(
        make_model(name).to(dtype), IRDConfig(**options), ADAPTERS[0]
    )
    model.add_adapter("two", IRDConfig(seed=1, **options))
    narrow = {"gpt2": "c_fc", "llama": "up_proj", "bert": "dense"}[name]
    model.add_adapter("three", IRDConfig(target_modules=[narrow], seed=2, **options))
    return model.eval()


def entries(model: PeftModel, adapter: str) -> dict[tuple[str, str], dict[int, float]]:
    """Return positions and values of every parameter in which an adapter has some."""
    found = {}
    for module, layer in layers_of(model).items():
        for name, at in layer._indices(adapter).items():
            values = layer.irdelta_values[adapter][name].tolist()
            found[module, name] = dict(zip(at.tolist(), values, strict=True))
    return found


def logits(model: PeftModel, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch(name)).logits


@pytest.mark.parametrize(
    ("rule", "majority"),
    [
        ("linear", "total"),
        ("magnitude_prune", "total"),
        ("ties", "total"),
        ("ties", "frequency"),
    ],
)
def test_entries_are_combined_one_by_one(name, rule, majority):
    model = with_three(name)
    before = {adapter: entries(model, adapter) for adapter in ADAPTERS}
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "all", rule, 0.6, majority)
    after = entries(model, "all")
    assert set(after) == set().union(*before.values())
    for key, found in after.items():
        deltas = [before[adapter].get(key, {}) for adapter in ADAPTERS]
        expected = combined_entries(deltas, WEIGHTS, rule, 0.6, majority)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()))
    assert {adapter: entries(model, adapter) for adapter in ADAPTERS} == before


@pytest.mark.parametrize("rule", ["magnitude_prune", "ties"])
def test_the_only_entry_of_a_parameter_is_kept(rule):
    base = nn.Linear(6, 4)
    options = {"method": "random", "budget": 2, "init_weights": False}
    options |= {"target_modules": ["0"], "scope": "per_module"}
    model = get_peft_model(nn.Sequential(base), IRDConfig(**options), "one")
    model.add_adapter("two", IRDConfig(seed=1, **options))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "all", rule, 0.4)
    found = entries(model, "all")
    assert all(any(values.values()) for values in found.values())


def test_a_sum_computes_what_the_adapters_compute_together(name):
    model = with_three(name)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["one", "two"])
    expected = logits(model, name)
    model.set_adapter("sum")
    assert_close(logits(model, name), expected, **TOL[torch.float64])


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_share_and_scales_it_up(rule):
    model = with_three("bert")
    model.add_weighted_adapter(["one"], [2.0], "share", rule, 0.5)
    one, kept, total = entries(model, "one"), 0, 0
    for key, found in entries(model, "share").items():
        for position, value in found.items():
            assert value == 0.0 or value == pytest.approx(4.0 * one[key][position])
            kept, total = kept + (value != 0.0), total + 1
    assert 0.4 < kept / total < 0.6


def test_dare_is_drawn_by_the_seed_of_the_first_adapter():
    model, state = with_three("bert"), torch.random.get_rng_state()
    for name in ("a", "b"):
        model.add_weighted_adapter(["one", "two"], [1, 1], name, "dare_linear", 0.5)
    model.add_weighted_adapter(["two", "one"], [1, 1], "c", "dare_linear", 0.5)
    assert entries(model, "a") == entries(model, "b") != entries(model, "c")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("rule", RULES)
def test_keeping_everything_of_one_adapter_scales_it(rule):
    model = with_three("gpt2")
    model.add_weighted_adapter(["one"], [-0.5], "scaled", rule, density=1.0)
    for key, found in entries(model, "scaled").items():
        expected = [-0.5 * value for value in entries(model, "one")[key].values()]
        assert list(found.values()) == pytest.approx(expected)


def test_the_new_adapter_is_frozen_and_inactive_until_it_is_set():
    model = with_three("bert")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_weighted_adapter(["one", "three"], [1.0, 1.0], "both")
    assert model.active_adapters == ["one"]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before.get(name, False)
    model.set_adapter("both")
    assert all(
        p.requires_grad == (".both." in n)
        for n, p in model.named_parameters()
        if "irdelta_values" in n
    )


def test_it_is_saved_and_loaded_and_says_what_it_is_made_of(tmp_path):
    model = with_three("llama", torch.float32)
    base = make_model("llama")
    weights = [np.float32(0.5), torch.tensor(2.0)]
    model.add_weighted_adapter(["one", "two"], weights, "both", "ties", 0.5)
    model.set_adapter("both")
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "both").eval()
    assert torch.equal(logits(loaded, "llama"), expected)
    origin = loaded.peft_config["default"].provenance
    assert origin["method"] == "ties"
    assert origin["adapters"] == {"one": 0.5, "two": 2.0}


def test_it_merges_and_unmerges_to_the_bit():
    model = with_three("bert", torch.float32)
    before = copy.deepcopy(model.state_dict())
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both")
    model.set_adapter("both")
    expected = logits(model, "bert")
    model.merge_adapter()
    assert torch.equal(logits(model, "bert"), expected)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("is_raised", [True, False])
def test_values_beside_low_precision_weights_keep_their_type(is_raised):
    torch.manual_seed(0)
    options = {"method": "random", "density": 0.3, "init_weights": False}
    model = get_peft_model(
        make_model("bert").to(torch.bfloat16), IRDConfig(**options), "one",
        autocast_adapter_dtype=is_raised,
    )  # fmt: skip
    model.add_weighted_adapter(["one"], [1.0 / 3.0], "third")
    dtype = torch.float32 if is_raised else torch.bfloat16
    for layer in layers_of(model).values():
        for name, values in layer.irdelta_values["third"].items():
            expected = layer.irdelta_values["one"][name].float() / 3.0
            assert values.dtype == dtype
            assert_close(values.data, expected.data.to(dtype))


def classifier(**options) -> IRDConfig:
    options = {"method": "random", "density": 0.1, "init_weights": False, **options}
    return IRDConfig(**options)


def test_the_head_of_one_adapter_is_taken_over_and_of_several_refused():
    torch.manual_seed(0)
    model = get_peft_model(
        make_model("bert"), classifier(modules_to_save=["classifier"]), "with"
    )
    model.add_adapter("without", classifier(seed=1))
    model.add_adapter("too", classifier(modules_to_save=["classifier"], seed=2))
    head = model.base_model.model.classifier
    with torch.no_grad():
        head.modules_to_save["with"].weight.normal_()
    model.add_weighted_adapter(["without", "with"], [1.0, 1.0], "both")
    copied = head.modules_to_save["both"]
    assert torch.equal(copied.weight, head.modules_to_save["with"].weight)
    assert copied.weight is not head.modules_to_save["with"].weight
    assert not copied.weight.requires_grad
    with pytest.raises(ValueError, match="modules_to_save, but with, too do"):
        model.add_weighted_adapter(["with", "too"], [1.0, 1.0], "neither")
    assert "neither" not in model.peft_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["one", "four"], [1.0, 1.0], "new"),
            "four does not exist; there are one, two, ",
        ),
        ((["one"], [1.0], "two"), "Adapter with name 'two' already exists"),
        (([], [], "new"), "`adapters` must name distinct adapters"),
        ((["one", "one"], [1.0, 1.0], "new"), "`adapters` must name distinct"),
        ((["one", "two"], [1.0], "new"), "`weights` must have one weight for each of"),
        ((["one"], [float("nan")], "new"), "`weights` must be finite"),
        ((["one"], [1.0], "new", "svd"), "`combination_type` must be one of 'linear'"),
        ((["one"], [1.0], "new", "ties"), r"`density` must be in \(0, 1\] for"),
        ((["one"], [1.0], "new", "ties", 1.5), "got 1.5"),
        ((["one"], [1.0], "new", "ties", 0.5, "most"), "`majority_sign_method` must"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(arguments, message):
    model = with_three("bert")
    keys, configs = list(model.state_dict()), dict(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.state_dict()) == keys
    assert model.peft_config == configs


def test_an_interruption_leaves_no_combination(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    model = with_three("bert")
    monkeypatch.setattr("peft_ird.model.share_tied", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.add_weighted_adapter(ADAPTERS, WEIGHTS, "all")
    assert list(model.peft_config) == ADAPTERS


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater:UserWarning")
def test_ties_of_dense_deltas_are_those_of_peft():
    """LoRA's deltas as a whole, where every entry is one of ours."""
    model = with_three("bert")
    shape = layers_of(model)["bert.pooler.dense"].get_delta_weight("one").shape
    deltas = {
        name: layers_of(model)["bert.pooler.dense"].get_delta_weight(name)
        for name in ADAPTERS
    }
    expected = ties([*deltas.values()], torch.tensor(WEIGHTS).double(), 1.0)
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "all", "ties", 1.0)
    found = layers_of(model)["bert.pooler.dense"].get_delta_weight("all")
    assert found.shape == shape
    assert_close(found, expected)
