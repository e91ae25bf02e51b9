"""Merging: what rounding loses, and what is never touched."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from peft_ird import IRDConfig, select_parameters
from peft_ird.layers import merging
from peft_ird.layers.layer import IRDLayer
from peft_ird.layers.merging import check_merge
from peft_ird.sparse.ops import scatter_
from tests.conftest import make_batch, make_model
from tests.oracles import TOL

WIDTH, ENTRIES = 64, 12


def adapted(dtype: torch.dtype, size: float) -> PeftModel:
    """Two layers with float32 deltas of about this size, relative to their weights."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).to(dtype)
    config = IRDConfig(
        budget=ENTRIES, method="random", scope="per_module", target_modules=["0", "1"]
    )
    model = get_peft_model(base, config)
    for layer in model.modules():
        if isinstance(layer, IRDLayer):
            for values in layer.irdelta_values["default"].values():
                values.data.copy_(size * torch.randn(values.shape))
    return model


def lost_share(model: PeftModel) -> float:
    """Round every entry by itself, in Python's floats."""
    lost = total = 0.0
    for layer in model.modules():
        if not isinstance(layer, IRDLayer):
            continue
        for name, indices in layer._indices("default").items():
            flat = layer.get_base_layer().get_parameter(name).flatten()
            values = layer.irdelta_values["default"][name].tolist()
            for index, value in zip(indices.tolist(), values, strict=True):
                old = float(flat[index])
                new = float(torch.tensor(old + value).to(flat.dtype))
                lost, total = lost + abs(new - old - value), total + abs(value)
    return lost / total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_loses_much_warns_once_and_says_how_much(dtype, merge, caplog):
    model = adapted(dtype, 1e-5 if dtype == torch.bfloat16 else 1e-6)
    share = lost_share(model)
    assert share > 0.1
    message = f"lost {share:.0%} of the deltas to rounding.*float32"
    caplog.set_level("INFO", logger="peft_ird")
    with pytest.warns(UserWarning, match=message) as caught:
        getattr(model, merge)()
    assert len(caught) == 1
    assert f"Rounding lost {100 * share:.2f} %" in caplog.text


def test_a_merge_that_loses_little_is_logged_only(caplog):
    model = adapted(torch.bfloat16, 1.0)
    share = lost_share(model)
    assert 0 < share < 0.1
    caplog.set_level("INFO", logger="peft_ird")
    model.merge_adapter()
    assert f"Rounding lost {100 * share:.2f} %" in caplog.text


@pytest.mark.parametrize("finish", ["merge_and_unload", "unload"])
def test_a_loss_is_reported_for_one_merge(finish, caplog):
    model = adapted(torch.bfloat16, 1e-5)
    with pytest.warns(UserWarning, match="to rounding"):
        model.merge_adapter()
    caplog.set_level("INFO", logger="peft_ird")
    if finish == "unload":
        model.unmerge_adapter()
        model.unload()
    else:
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_and_unload()
    assert "Rounding" not in caplog.text


def test_merging_into_float32_has_nothing_to_report(caplog):
    caplog.set_level("INFO", logger="peft_ird")
    adapted(torch.float32, 1e-6).merge_and_unload()
    assert "Rounding" not in caplog.text


class NoWholeWeight(TorchDispatchMode):
    """Fails on every operation that reads or makes as much as a weight has."""

    # These touch the entries that they are given, or nothing.
    SPARSE = ("alias", "detach", "index", "index_select", "scatter_", "view")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for tensor in tree_leaves((result, args)):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= WIDTH * WIDTH:
                assert name in self.SPARSE, name
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [nn.Linear, Conv1D])
def test_a_bias_in_low_precision_costs_no_product(dtype, make):
    torch.manual_seed(0)
    base = make(WIDTH, WIDTH).to(dtype)
    options = {"method": "bias", "target_modules": ["0"], "init_weights": False}
    model = get_peft_model(nn.Sequential(base), IRDConfig(**options))
    layer = model.base_model.model[0]
    x = torch.randn(3, WIDTH, dtype=dtype)
    delta = layer.get_delta_weight("default", "bias").double()
    exact = layer.base_layer(x).double() + delta
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= WIDTH * WIDTH:
                seen.append(func)
            return result

    with Products():
        found = model(x)
    assert not [f for f in seen if f.overloadpacket.__name__ not in {"t", "detach"}]
    assert_close(found.double(), exact, **TOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Merging into low-precision")
@pytest.mark.filterwarnings("ignore:Adapter cannot be set:UserWarning")
def test_switching_costs_as_much_as_there_are_entries(dtype):
    model = adapted(dtype, 1e-2)
    second = IRDConfig(budget=ENTRIES, method="random", seed=1)
    model.add_adapter("second", second)
    before = copy.deepcopy(model.state_dict())
    with NoWholeWeight():
        model.set_adapter("second")
        model.set_adapter("default")
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_adapter(["second"], safe_merge=True)
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
        model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_watch_over_whole_weights_sees_them():
    with pytest.raises(AssertionError), NoWholeWeight():
        torch.zeros(WIDTH, WIDTH).clone()


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_entries_of_a_tied_weight_act_wherever_it_is(targets):
    """Whichever of its names the adapter knows it by."""
    settings = {"task_type": "CAUSAL_LM", "init_weights": False}
    selection = select_parameters(
        make_model("llama-untied"),
        IRDConfig(density=0.2, method="random", target_modules=targets, **settings),
    )
    assert len(selection.indices) == len(targets)
    torch.manual_seed(0)
    model = make_model("llama").double()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = get_peft_model(model, IRDConfig(selection=selection, **settings)).eval()
    active = model(**make_batch("llama")).logits
    model.merge_adapter()
    assert_close(model(**make_batch("llama")).logits, active)
    model.unmerge_adapter()
    assert_close(model(**make_batch("llama")).logits, active)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_disabled", [False, True])
@pytest.mark.filterwarnings("ignore:Already:UserWarning")
def test_adapters_that_know_a_tied_weight_by_other_names(dtype, is_disabled):
    settings = {"task_type": "CAUSAL_LM", "init_weights": False}
    selections = [
        select_parameters(
            make_model("llama-untied"),
            IRDConfig(density=0.2, method="random", target_modules=[name], **settings),
        )
        for name in ("lm_head", "embed_tokens")
    ]
    torch.manual_seed(0)
    model = make_model("llama").to(dtype)
    model = get_peft_model(model, IRDConfig(selection=selections[0], **settings), "one")
    model.add_adapter("two", IRDConfig(selection=selections[1], **settings))
    before = model.get_base_model().lm_head.get_base_layer().weight.clone()
    for merges in ("one",), ("two",), ("one", "two"), ("two", "one"), (None,):
        names = [name for name in merges if name] or ["one", "two"]
        model.base_model.set_adapter(names)
        active = model.eval()(**make_batch("llama")).logits
        for name in merges:
            model.merge_adapter(name and [name])
        assert_close(model(**make_batch("llama")).logits, active)
        if is_disabled:
            with model.disable_adapter():
                model(**make_batch("llama"))
        else:
            model.unmerge_adapter()
        after = model.get_base_model().lm_head.get_base_layer().weight
        assert torch.equal(after, before)


def test_a_name_given_twice_is_merged_once():
    model = adapted(torch.float32, 1.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(["default", "default"])
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("finish", ["merge_adapter", "merge_and_unload"])
def test_mixed_models_check_before_they_merge_and_report(finish):
    torch.manual_seed(0)
    options = {"method": "random", "density": 0.05, "init_weights": False}
    settings = IRDConfig(task_type="SEQ_CLS", **options)
    model = get_peft_model(make_model("bert"), settings, mixed=True)
    layer = [m for m in model.modules() if isinstance(m, IRDLayer)][-1]
    values = next(iter(layer.irdelta_values["default"].values()))
    before = {n: p.clone() for n, p in model.named_parameters()}
    values.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, finish)(safe_merge=True)
    after = dict(model.named_parameters())
    values.data[0] = 0.0
    assert all(torch.equal(before[n], p) for n, p in after.items() if p is not values)
    model = model.bfloat16()
    for each in model.modules():
        if isinstance(each, IRDLayer):
            for entries in each.irdelta_values["default"].values():
                entries.data = 1e-5 * torch.ones_like(entries)
    with pytest.warns(UserWarning, match="of the deltas to rounding"):
        getattr(model, finish)()


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def second_config(seed: int = 1, **options) -> IRDConfig:
    return IRDConfig(budget=ENTRIES, method="random", seed=seed, **options)


@pytest.mark.parametrize("finish", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_offloaded_weights_are_merged(finish, safe_merge):
    model, x = adapted(torch.float32, 1.0), torch.randn(3, WIDTH)
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    merged = getattr(model, finish)(safe_merge=safe_merge) or model
    assert_close(merged(x), expected)


@pytest.mark.parametrize("finish", ["merge_adapter", "merge_and_unload"])
def test_all_loaded_entries_are_checked_before_any_is_written(finish):
    source = adapted(torch.float32, 1.0)
    state = copy.deepcopy(source.state_dict())
    (code,) = (t for key, t in state.items() if "1.irdelta_coded" in key)
    code[-1] ^= 1
    model = adapted(torch.float32, 1.0)
    model.load_state_dict(state)
    before = parameters(model)
    with pytest.raises(ValueError, match="'1"):
        getattr(model, finish)()
    assert unchanged(model, before)
    assert not model.get_model_status().merged_adapters


def test_a_safe_merge_looks_at_what_is_merged_alone():
    model = adapted(torch.float32, torch.nan)
    model.add_adapter("second", second_config(init_weights=False))
    before = parameters(model)
    model.merge_adapter([], safe_merge=True)
    model.merge_adapter(["second"], safe_merge=True)
    model.unmerge_adapter()
    base = {n: p for n, p in before.items() if "irdelta" not in n}
    found = parameters(model)
    assert all(torch.equal(found[name], p) for name, p in base.items())


def test_a_safe_merge_checks_the_sum_of_adapters():
    model = adapted(torch.float16, 0.0)
    model.add_adapter("second", second_config(seed=0, scope="per_module"))
    layers = [m for m in model.modules() if isinstance(m, IRDLayer)]
    for layer in layers:
        for values in layer.irdelta_values.parameters():
            values.data.fill_(40000.0)
    before = parameters(model)
    message = "adapter second seems to be broken, in '0'"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(["default", "second"], safe_merge=True)
    assert unchanged(model, before)
    with pytest.raises(ValueError, match=message):  # of a layer by itself, too
        layers[0].merge(safe_merge=True, adapter_names=["default", "second"])
    assert not layers[0].merged
    assert not layers[0].irdelta_originals
    assert unchanged(model, before)
    model.merge_adapter(["default"], safe_merge=True)


class Coded(nn.Linear):
    """Codes of a weight that is there in no other form."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        codes = (100 * layer.weight.detach()).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 100).T


def test_codes_refuse_those_adapters_alone_that_have_entries_in_them():
    torch.manual_seed(0)
    base = nn.Sequential(Coded(nn.Linear(8, 8)), nn.Linear(8, 8))
    model = get_peft_model(base, second_config(target_modules=["0"]))
    model.add_adapter("second", second_config(target_modules=["1"]))
    check_merge(model.base_model, ["second"], safe_merge=True)
    for names in (None, ["default"], ["second", "default"]):
        with pytest.raises(ValueError, match="'0' is quantised; deltas can only be"):
            model.merge_adapter(names)
    assert not model.base_model.model[1].merged
    model.merge_adapter(["second"])
    assert model.base_model.model[1].merged_adapters == ["second"]


@pytest.mark.parametrize("method", ["merge", "unmerge"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_leaves_no_change_that_nobody_lists(
    method, moment, monkeypatch
):
    model = adapted(torch.float32, 1.0)
    model.add_adapter("second", second_config(scope="per_module", init_weights=False))
    layer = model.base_model.model[0]
    base = parameters(layer.base_layer)
    calls = []

    def interrupted(weight, indices, entries):
        calls.append(weight)
        if moment == "after":
            scatter_(weight, indices, entries)
        if len(calls) == 2:
            raise KeyboardInterrupt
        if moment == "before":
            scatter_(weight, indices, entries)

    if method == "unmerge":
        layer.merge(adapter_names=["default", "second"])
    options = {} if method == "unmerge" else {"adapter_names": ["default", "second"]}
    with monkeypatch.context() as patched:
        patched.setattr(merging, "scatter_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(layer, method)(**options)
    assert len(calls) >= 2
    assert layer.merged == (method == "unmerge")
    if layer.merged:
        layer.unmerge()
    assert unchanged(layer.base_layer, base)
    assert not layer.irdelta_originals
