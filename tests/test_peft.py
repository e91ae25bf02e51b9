"""What a user of PEFT expects of any tuner, on tiny BERT, GPT-2 and LLaMA."""

import copy
import io
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    TaskType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.testing import assert_close
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_ird import Calibration, IRDConfig, IRDModel, select_parameters
from peft_ird.adapter.modules import layers_of
from peft_ird.layers.layer import IRDLayer
from peft_ird.sparse import ways
from tests.conftest import make_batch, make_model, make_samples, task_type
from tests.oracles import TOL


def config(name: str, **options) -> IRDConfig:
    options = {"density": 0.02, "method": "random", "init_weights": False, **options}
    return IRDConfig(task_type=task_type(name), **options)


def adapted(name: str, **options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(make_model(name), config(name, **options)).eval()


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch(name)).logits


def test_importing_registers_the_tuner():
    assert PeftType("IRD") is PeftType.IRD
    assert PeftType.IRD in list(PeftType)
    assert PeftType.IRD == "IRD"
    assert isinstance(
        get_peft_model(make_model("bert"), config("bert")).base_model, IRDModel
    )


def test_registering_twice_changes_nothing():
    import importlib  # noqa: PLC0415

    import peft_ird  # noqa: PLC0415

    before = list(PeftType)
    importlib.reload(peft_ird)
    assert list(PeftType) == before
    adapted("bert")


def test_one_call_selects_and_injects(name):
    model = make_model(name)
    base = logits(model, name)
    options = {"density": 0.01, "num_samples": 8, "method": "ird", "init_weights": True}
    data = make_samples(name)
    peft_model = get_peft_model(model, config(name, calibration=data, **options))
    trainable, total = peft_model.get_nb_trainable_parameters()
    settings = peft_model.peft_config["default"]
    entries = sum(
        k for counts in settings.nnz_pattern.values() for k in counts.values()
    )
    head = sum(
        p.numel() for n, p in peft_model.named_parameters() if "modules_to_save" in n
    )
    assert trainable == entries + head
    assert 0 < entries < 0.011 * total
    assert torch.equal(logits(peft_model.eval(), name), base)
    peft_model.print_trainable_parameters()


def test_a_budget_is_met_exactly(name):
    model = adapted(name, density=None, budget=123)
    count = sum(p.numel() for n, p in model.named_parameters() if "irdelta" in n)
    assert count == 123


def test_the_whole_surface_of_targets():
    def targeted(**options):
        pattern = (
            adapted("bert", density=1.0, **options).peft_config["default"].nnz_pattern
        )
        return set(pattern)

    every = targeted()
    names = [n for n, m in make_model("bert").bert.named_modules() if m._parameters]
    assert every == {f"bert.{n}" for n in names}
    linear = {n for n in every if "LayerNorm" not in n and "embeddings" not in n}
    assert targeted(target_modules="all-linear") == linear
    queries = {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
    assert targeted(target_modules=["query"]) == queries
    assert targeted(target_modules=r".*\.1\..*query") == {max(queries)}
    assert targeted(target_modules=["query"], layers_to_transform=0) == {min(queries)}
    assert targeted(layers_to_transform=[1]) == {n for n in every if ".layer.1." in n}
    assert targeted(
        target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"
    ) == {max(queries)}
    assert targeted(exclude_modules=["query"]) == every - queries
    assert targeted(exclude_modules=r".*encoder.*") == {
        n for n in every if "encoder" not in n
    }
    assert targeted(modules_to_save=["pooler"]) == every - {"bert.pooler.dense"}


def test_the_head_is_trained_whole_and_is_no_candidate():
    model = adapted("bert", density=1.0)
    assert not any("classifier" in n for n in model.peft_config["default"].nnz_pattern)
    for task in ("SEQ_CLS", TaskType.SEQ_CLS):
        settings = IRDConfig(task_type=task, density=1.0, method="random")
        assert (
            "classifier" not in select_parameters(make_model("bert"), settings).counts
        )
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad


def test_adapters_are_added_switched_and_deleted(name):
    model = adapted(name)
    base = logits(make_model(name), name)
    one = logits(model, name)
    torch.manual_seed(2)
    model.add_adapter("second", config(name, seed=1))
    assert torch.equal(logits(model, name), one)
    model.set_adapter("second")
    two = logits(model, name)
    assert not torch.equal(one, two)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), base)
    assert torch.equal(logits(model, name), two)
    model.set_adapter("default")
    assert torch.equal(logits(model, name), one)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert not any(".default." in n for n, _ in model.named_parameters())
    model.set_adapter("second")
    assert torch.equal(logits(model, name), two)


@pytest.mark.parametrize("deleted_first", [True, False])
def test_deleting_the_active_adapter_activates_one_everywhere(deleted_first):
    """Adapters have different modules, and no layer knows them all."""
    targets = {"one": ["query"], "two": ["value"], "both": ["query", "value"]}
    order = ["both", "one", "two"] if deleted_first else ["one", "two", "both"]
    torch.manual_seed(0)
    model = get_peft_model(
        make_model("bert"), config("bert", target_modules=targets[order[0]]), order[0]
    )
    for each in order[1:]:
        model.add_adapter(each, config("bert", target_modules=targets[each]))
    model.eval().set_adapter("one")
    expected = logits(model, "bert")
    model.set_adapter("both")
    with pytest.warns(UserWarning, match="Setting active adapter to one"):
        model.delete_adapter("both")
    layers = [m for m in model.modules() if isinstance(m, IRDLayer)]
    assert {tuple(layer.active_adapters) for layer in layers} == {("one",)}
    assert model.active_adapter == "one"
    assert torch.equal(logits(model, "bert"), expected)


def test_deleting_an_inactive_adapter_leaves_another_one_merged(name):
    model = adapted(name)
    model.add_adapter("second", config(name, seed=1))
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.delete_adapter("second")
    owners = [m for m in model.modules() if isinstance(m, IRDLayer) and m.merged]
    assert len(owners) == len(model.peft_config["default"].nnz_pattern)


def test_deleting_the_last_adapter_leaves_the_base(name):
    model = adapted(name)
    model.base_model.delete_adapter("default")
    with torch.no_grad():
        found = model.base_model.model(**make_batch(name)).logits
    assert torch.equal(found, logits(make_model(name), name))


def test_an_adapter_is_loaded_after_the_only_one_was_deleted(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    expected = logits(model, "llama")
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    assert torch.equal(logits(model, "llama"), expected)


def test_an_adapter_that_is_added_while_all_are_off_is_off_too(name):
    base = logits(make_model(name), name)
    model = adapted(name, budget=40, density=None)
    with model.disable_adapter():
        model.add_adapter("second", config(name, density=0.5, seed=1))
        model.set_adapter("second")
        assert torch.equal(logits(model, name), base)
    assert not torch.equal(logits(model, name), base)


def test_a_head_cannot_cover_entries_of_another_adapter():
    model = adapted("bert", density=1.0)
    with pytest.raises(ValueError, match=r"`modules_to_save` covers 'bert\.pooler"):
        model.add_adapter("second", config("bert", modules_to_save=["pooler"]))
    assert list(model.peft_config) == ["default"]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    ("head", "target"),
    [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")],
)
def test_a_tied_parameter_has_no_entries_beside_a_head_trained_whole(head, target):
    untied = config("llama", target_modules=[target], density=0.5)
    entries = IRDConfig(
        task_type="CAUSAL_LM",
        selection=select_parameters(make_model("llama-untied"), untied),
    )
    whole = config("llama", target_modules=["q_proj"], modules_to_save=[head])
    for one, other, left_out in ((whole, entries, target), (entries, whole, head)):
        model = get_peft_model(make_model("llama"), copy.copy(one))
        before = set(model.state_dict())
        message = (
            f"`modules_to_save` covers '{head}', which shares a parameter with "
            f"'{target}', .* Leave '{left_out}' out of the new adapter"
        )
        with pytest.raises(ValueError, match=message):
            model.add_adapter("second", other)
        assert list(model.peft_config) == ["default"]
        assert set(model.state_dict()) == before


def test_a_parameter_that_a_head_holds_is_no_candidate():
    settings = config("gpt2", modules_to_save=["lm_head"], density=1.0)
    assert (
        "transformer.wte" not in select_parameters(make_model("gpt2"), settings).counts
    )


def test_what_is_trained_whole_has_no_entries():
    """PEFT takes `pre_classifier` for a classifier: its name ends like one."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    base = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, max_position_embeddings=16, **sizes)
    )
    model = get_peft_model(base, config("bert", density=1.0))
    whole = {n.split(".modules_to_save")[0] for n, _ in model.named_modules()
             if n.endswith(".modules_to_save")}  # fmt: skip
    assert whole == {"base_model.model.pre_classifier", "base_model.model.classifier"}
    counts = model.peft_config["default"].nnz_pattern
    assert not any("classifier" in module for module in counts)


@pytest.mark.parametrize(
    ("options", "module"),
    [
        ({}, "classifier"),
        ({"modules_to_save": ["bert.pooler"]}, r"bert\.pooler\.dense"),
    ],
)
def test_a_selection_with_entries_in_a_head_is_refused(options, module):
    model = make_model("bert")
    everything = select_parameters(model, IRDConfig(method="random", density=1.0))
    if options:  # the first in the model's order is told
        del everything.indices["classifier"]
    with pytest.raises(ValueError, match=f"`selection` has entries in '{module}'"):
        get_peft_model(
            model, IRDConfig(task_type="SEQ_CLS", selection=everything, **options)
        )
    assert not any(isinstance(m, IRDLayer) for m in model.modules())


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    settings = config(
        "bert", density=np.float32(0.25), seed=np.int64(3), num_samples=np.int32(4),
        schedule=[(np.int64(4), np.float32(0.25))], layers_to_transform=[np.int64(1)],
    )  # fmt: skip
    settings.save_pretrained(tmp_path)
    again = IRDConfig.from_pretrained(tmp_path)
    assert (again.density, again.seed, again.num_samples) == (0.25, 3, 4)
    assert again.schedule == [(4, 0.25)]
    assert again.layers_to_transform == [1]


def test_only_the_active_adapter_is_trainable(name):
    model = adapted(name)
    model.add_adapter("second", config(name, seed=1))

    def trainable():
        return {
            n.split("irdelta_values.")[1].split(".")[0]
            for n, p in model.named_parameters()
            if p.requires_grad and "irdelta" in n
        }

    assert trainable() == {"default"}
    model.set_adapter("second")
    assert trainable() == {"second"}
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if "base_layer" in n
    )


def test_a_second_adapter_selects_on_the_base_model(name):
    data = make_samples(name)
    options = {"density": 0.01, "num_samples": 8, "method": "ird", "calibration": data}
    alone = adapted(name, **options).peft_config["default"].nnz_pattern
    model = adapted(name, seed=4)
    model.train()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter("second", config(name, **options))
    assert model.peft_config["second"].nnz_pattern == alone
    after = dict(model.named_parameters())
    assert all(after[n].requires_grad == flag for n, flag in flags.items())
    assert model.training


def test_both_adapters_active_add_up(name):
    model = adapted(name)
    if task_type(name) == "SEQ_CLS":  # two whole heads cannot be active at once
        model = get_peft_model(
            make_model(name),
            IRDConfig(density=0.02, method="random", init_weights=False),
        ).eval()
    second = IRDConfig(density=0.02, method="random", init_weights=False, seed=1)
    model.add_adapter("second", second)
    tuner = model.base_model
    merged = copy.deepcopy(model)
    tuner.set_adapter(["default", "second"])
    both = logits(model, name)
    merged = merged.merge_and_unload(adapter_names=["default", "second"])
    assert_close(logits(merged, name), both, **TOL[torch.float32])
    tuner.set_adapter("default")
    assert not torch.equal(logits(model, name), both)


def test_all_linear_finds_layers_that_are_wrapped_already(name):
    model = adapted(name, target_modules="all-linear", density=0.5)
    model.add_adapter("second", config(name, target_modules="all-linear", density=0.5))
    patterns = [c.nnz_pattern for c in model.peft_config.values()]
    assert patterns[0] == patterns[1]


def test_a_config_can_be_used_again():
    settings = config("bert", density=0.05)
    one = get_peft_model(make_model("bert"), settings).eval()
    first = copy.deepcopy(settings.nnz_pattern)
    torch.manual_seed(7)
    two = get_peft_model(make_model("bert"), settings).eval()
    assert settings.nnz_pattern == first
    assert not torch.equal(logits(one, "bert"), logits(two, "bert"))  # other values


def test_adapters_of_one_config_are_saved_and_loaded_for_their_own_models(tmp_path):
    settings = IRDConfig(method="bias")
    bases = [nn.Sequential(nn.Linear(4, width)) for width in (3, 6)]
    copies = copy.deepcopy(bases)
    models = [get_peft_model(base, settings) for base in bases]
    for n, (model, base) in enumerate(zip(models, copies, strict=True)):
        model.save_pretrained(tmp_path / str(n))
        loaded = PeftModel.from_pretrained(base, tmp_path / str(n))
        model.load_adapter(tmp_path / str(n), "default")
        x = torch.randn(2, 4)
        assert torch.equal(loaded(x), model(x))


def test_a_state_dict_of_other_entries_is_refused_and_nothing_is_lost(name):
    settings = {"method": "random", "density": 0.03, "task_type": task_type(name)}
    one, two = (
        get_peft_model(make_model(name), IRDConfig(seed=seed, **settings)).eval()
        for seed in (0, 1)
    )

    def entries(model):
        return {
            module: {n: at.tolist() for n, at in layer._indices("default").items()}
            for module, layer in layers_of(model).items()
        }

    before, others = entries(one), entries(two)
    with pytest.raises(RuntimeError, match="size mismatch"):
        one.load_state_dict(two.state_dict())
    for module, found in entries(one).items():  # where sizes are alike, torch loads
        assert found in (before[module], others.get(module))
    assert logits(one, name).isfinite().all()


def test_a_selection_serves_one_injection(name):
    selection = select_parameters(
        make_model(name), config(name, budget=9, density=None)
    )
    settings = IRDConfig(
        task_type=task_type(name), selection=selection, method="random"
    )
    get_peft_model(make_model(name), settings)
    with pytest.raises(ValueError, match="it has been used: pass it again"):
        get_peft_model(make_model(name), settings)


def test_a_selection_made_on_data_serves_one_injection():
    options = {"density": 0.01, "num_samples": 8, "method": "fish"}
    selection = select_parameters(
        make_model("bert"), config("bert", **options), make_samples("bert")
    )
    settings = IRDConfig(task_type="SEQ_CLS", selection=selection)
    model = get_peft_model(make_model("bert"), settings)
    with pytest.raises(ValueError, match="it has been used: pass it again"):
        model.add_adapter("second", settings)


@pytest.mark.parametrize("other", ["llama", "wider"])
def test_a_selection_made_on_another_model_says_so(other):
    settings = config("bert", target_modules=["pooler.dense"], budget=9, density=None)
    selection = select_parameters(make_model("bert"), settings)
    model = make_model("llama")
    if other == "wider":
        model = make_model("bert")
        model.bert.pooler.dense = nn.Linear(5, 5)
    advice = r"`selection` .*\. Select on this model with `select_parameters`\.$"
    with pytest.raises(ValueError, match=advice):
        get_peft_model(model, IRDConfig(selection=selection))


def test_an_interrupted_selection_leaves_no_adapter(name):
    def interrupted(_):
        raise KeyboardInterrupt

    model = adapted(name)
    data = Calibration(make_samples(name), interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.add_adapter("second", config(name, method="fish", calibration=data))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", config(name))


def test_a_failed_injection_keeps_the_selection(name):
    selection = select_parameters(
        make_model(name), config(name, budget=9, density=None)
    )
    settings = IRDConfig(task_type=task_type(name), selection=selection, budget=8)
    with pytest.raises(ValueError, match="has 9 entries"):
        get_peft_model(make_model(name), settings)
    assert settings.selection is selection


def test_a_selection_can_be_made_first_and_used_later(name):
    data = make_samples(name)
    options = {"density": 0.01, "num_samples": 8, "method": "ird"}
    selection = select_parameters(make_model(name), config(name, **options), data)
    settings = IRDConfig(task_type=task_type(name), selection=selection)
    model = get_peft_model(make_model(name), settings)
    together = adapted(name, calibration=data, **options)
    assert settings.selection is None
    assert settings.nnz_pattern == together.peft_config["default"].nnz_pattern
    for module, parameters in selection.indices.items():
        layer = model.base_model.model.get_submodule(module)
        for parameter, indices in parameters.items():
            assert torch.equal(layer.irdelta_indices["default"][parameter], indices)


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p.clone()
        for name, p in model.named_parameters()
        if "irdelta" not in name and "modules_to_save" not in name
    }


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_outputs_are_those_of_the_active_adapter_and_unmerge_is_exact(
    name, safe_merge
):
    model = adapted(name)
    before = base_weights(model)
    active = logits(model, name)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(logits(model, name), active)
    model.unmerge_adapter()
    after = base_weights(model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(logits(model, name), active)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(logits(merged, name), active)
    assert not any(isinstance(m, IRDLayer) for m in merged.modules())


def test_unload_gives_the_base_model_back(name, capsys):
    base = make_model(name)
    expected = logits(base, name)
    weights = {n: p.clone() for n, p in base.named_parameters()}
    torch.manual_seed(1)
    unloaded = get_peft_model(base, config(name)).unload()
    assert not capsys.readouterr().err  # no bar, as PEFT's own
    assert torch.equal(logits(unloaded, name), expected)
    found = dict(unloaded.named_parameters())
    assert list(found) == list(weights)
    assert all(torch.equal(found[n], weights[n]) for n in weights)


def test_merging_two_adapters_in_turn_unmerges_exactly(name):
    model = adapted(name, density=0.5)
    model.add_adapter("second", config(name, density=0.5, seed=1))
    before = base_weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["default"])
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    after = base_weights(model)
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_safe_merge_finds_nan_before_anything_is_written(name):
    model = adapted(name)
    before = base_weights(model)
    values = next(p for n, p in model.named_parameters() if "irdelta" in n)
    values.data[0] = torch.nan
    message = "NaNs detected in the merged weights. The adapter default seems to be"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    layer = next(m for m in model.modules() if isinstance(m, IRDLayer))
    assert not layer.merged
    after = base_weights(model)
    first = next(iter(before))
    assert torch.equal(after[first], before[first])


def test_safe_merge_looks_at_every_layer_before_it_writes(name):
    model = adapted(name)
    before = base_weights(model)
    values = [p for n, p in model.named_parameters() if "irdelta" in n]
    values[-1].data[-1] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    after = base_weights(model)
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_weights_cannot_be_loaded_into_a_merged_adapter(name):
    state_dict = get_peft_model_state_dict(adapted(name, seed=3))
    model = adapted(name)
    before = base_weights(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base weights"):
        set_peft_model_state_dict(model, state_dict)
    model.unmerge_adapter()
    after = base_weights(model)
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_merged_model_selects_on_its_base_and_stays_merged(name):
    settings = config(name, method="magnitude")
    expected = select_parameters(make_model(name), settings).counts
    model = adapted(name, density=0.5)
    model.merge_adapter()
    merged = base_weights(model)
    assert select_parameters(model, settings).counts == expected
    after = base_weights(model)
    assert all(torch.equal(after[n], merged[n]) for n in merged)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("target", [["wte", "embed_tokens"], ["lm_head"], None])
def test_a_delta_of_tied_embeddings_acts_on_both_sides(kind, target):
    """Writing the entries into the shared weight is what the delta stands for."""
    base = make_model(kind)
    model = adapted(kind, target_modules=target, density=0.3)
    embedding = model.get_input_embeddings()
    owner = "transformer.wte" if kind == "gpt2" else "model.embed_tokens"
    assert owner in model.peft_config["default"].nnz_pattern
    assert "lm_head" not in model.peft_config["default"].nnz_pattern
    if target is not None:
        weight = base.get_input_embeddings().weight
        flat = weight.data.view(-1)
        indices = embedding.irdelta_indices["default"]["weight"].long()
        flat[indices] += embedding.irdelta_values["default"]["weight"].data
        assert torch.equal(logits(model, kind), logits(base, kind))
    active = logits(model, kind)
    with model.disable_adapter():
        assert not torch.equal(logits(model, kind), active)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(logits(merged, kind), active)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_gradient_of_a_tied_delta_sums_both_uses(kind):
    model = adapted(kind, target_modules=["wte", "embed_tokens"], density=1.0)
    oracle = copy.deepcopy(model).merge_and_unload()
    oracle.get_input_embeddings().weight.requires_grad_(True)
    batch = make_batch(kind)
    model(**batch).loss.backward()
    oracle(**batch).loss.backward()
    values = model.get_input_embeddings().irdelta_values["default"]["weight"]
    expected = oracle.get_input_embeddings().weight.grad.flatten()
    assert_close(values.grad, expected, **TOL[torch.float32])
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == values.numel()


def test_the_status_is_that_of_a_regular_tuner(name):
    model = adapted(name)
    model.add_adapter("second", config(name, seed=1))
    status = get_model_status(model)
    assert status.peft_types == {"default": "IRD", "second": "IRD"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert sorted(status.available_adapters) == ["default", "second"]
    assert status.trainable_params > 0
    assert len(get_layer_status(model)) > 0
    model.merge_adapter()
    # PEFT counts the whole head as an adapter that is not merged.
    expected = "irregular" if task_type(name) == "SEQ_CLS" else ["default"]
    assert get_model_status(model).merged_adapters == expected


def test_inject_adapter_in_model_and_its_state_dict(name):
    torch.manual_seed(1)
    settings = config(name)
    model = inject_adapter_in_model(settings, make_model(name)).eval()
    expected = logits(model, name)
    state_dict = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(config(name, seed=5), make_model(name)).eval()
    result = set_peft_model_state_dict(other, state_dict)  # resized to fit
    assert not result.unexpected_keys
    assert torch.equal(logits(other, name), expected)
    fresh = inject_adapter_in_model(
        config(name, seed=6), make_model(name), state_dict=state_dict
    ).eval()
    set_peft_model_state_dict(fresh, state_dict)
    assert torch.equal(logits(fresh, name), expected)


def test_a_matrix_may_have_got_rows_since_its_adapter_was_saved(tmp_path):
    def base(rows: int) -> nn.Module:
        return nn.Sequential(OrderedDict(lin=nn.Linear(4, rows, bias=False)))

    settings = IRDConfig(density=0.3, method="random", target_modules=["lin"])
    model, grown, x = get_peft_model(base(6), settings), base(8), torch.randn(2, 4)
    values = model.base_model.model.lin.irdelta_values["default"]["weight"]
    nn.init.normal_(values)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        grown.lin.weight[:6] = model.base_model.model.lin.base_layer.weight
    loaded = PeftModel.from_pretrained(grown, tmp_path)
    assert_close(loaded(x)[:, :6], model(x))
    assert_close(loaded(x)[:, 6:], x @ grown.lin.base_layer.weight[6:].t())


@pytest.mark.parametrize("width", [4, 16])
def test_entries_of_another_size_are_refused(width, tmp_path):
    """Flat positions would be those of other rows and columns."""
    options = {"density": 0.3, "method": "random", "target_modules": ["lin"]}

    def model(width: int) -> PeftModel:
        base = nn.Sequential(OrderedDict(lin=nn.Linear(width, width, bias=False)))
        return get_peft_model(base, IRDConfig(**options))

    narrow, wide = model(8), model(width)
    state_dict = get_peft_model_state_dict(narrow)
    narrow.save_pretrained(tmp_path)
    before = get_peft_model_state_dict(wide)
    bare = {k.removeprefix("base_model.model."): t for k, t in state_dict.items()}
    fresh = inject_adapter_in_model(
        IRDConfig(**options), model(width).unload(), state_dict=bare
    )
    for load in (
        lambda: set_peft_model_state_dict(wide, state_dict),
        lambda: wide.load_adapter(tmp_path, "default"),
        lambda: set_peft_model_state_dict(fresh, bare),
    ):
        with pytest.raises(ValueError, match="weight"):
            load()
    after = get_peft_model_state_dict(wide)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_resized_adapter_is_trainable_and_logged(name, caplog):
    state_dict = get_peft_model_state_dict(adapted(name))
    model = adapted(name, seed=3)
    with caplog.at_level("WARNING", logger="peft_ird"):
        set_peft_model_state_dict(model, state_dict)
    assert "is resized" in caplog.text
    assert all(p.requires_grad for n, p in model.named_parameters() if "irdelta" in n)
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if "base_layer" in n
    )


def test_as_many_entries_in_other_places_are_loaded(name):
    """Nothing is resized then, but the places are others."""
    targets = {"bert": ["word_embeddings", "position_embeddings"],
               "gpt2": ["wte", "wpe"], "llama": "all-linear"}  # fmt: skip
    options = {"target_modules": targets[name], "scope": "per_module", "density": 0.3}
    model, other = (adapted(name, seed=seed, **options) for seed in (3, 4))
    patterns = [m.peft_config["default"].nnz_pattern for m in (model, other)]
    assert not torch.equal(logits(model, name), logits(other, name))
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert not result.unexpected_keys
    assert torch.equal(logits(model, name), logits(other, name))
    assert patterns[0] == patterns[1]


@pytest.mark.parametrize("is_frozen", [True, False])
def test_loading_into_an_inactive_adapter_leaves_the_active_one_as_it_was(is_frozen):
    state_dict = get_peft_model_state_dict(adapted("bert"))
    model = adapted("bert", seed=3)
    model.add_adapter("second", config("bert", seed=4))
    model.set_requires_grad("default", not is_frozen)
    set_peft_model_state_dict(model, state_dict, adapter_name="second")
    flags = {
        each: {p.requires_grad for n, p in model.named_parameters() if each in n}
        for each in ("irdelta_values.default", "irdelta_values.second")
    }
    assert flags == {
        "irdelta_values.default": {not is_frozen},
        "irdelta_values.second": {False},
    }


def test_a_resized_adapter_stays_in_float32(name):
    state_dict = get_peft_model_state_dict(adapted(name))
    assert state_dict
    model = get_peft_model(make_model(name).bfloat16(), config(name, seed=3))
    set_peft_model_state_dict(model, state_dict)
    loaded = get_peft_model_state_dict(model)
    for key, tensor in state_dict.items():
        if "irdelta_values" in key:
            assert loaded[key].dtype == torch.float32
            assert torch.equal(loaded[key], tensor)


def test_a_distributed_state_dict_names_what_the_model_has(name):
    model = adapted(name)
    expected = model.state_dict()
    found = get_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    on_meta = model.to("meta").state_dict()
    assert {key: tensor.shape for key, tensor in on_meta.items()} == shapes


def test_low_cpu_mem_usage(name, tmp_path):
    model = adapted(name)
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_model(name), tmp_path, low_cpu_mem_usage=True
    ).eval()
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(logits(loaded, name), expected)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, name), expected)


def test_gradients_reach_the_values_and_nothing_else(name):
    model = adapted(name).train()
    model(**make_batch(name)).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        is_trained = "irdelta" in parameter_name or "modules_to_save" in parameter_name
        assert (parameter.grad is not None) == is_trained, parameter_name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    def gradients(checkpointing):
        torch.manual_seed(1)
        base = make_model(name)
        if checkpointing:
            enable = getattr(base, "activation_checkpointing_enable", None)
            enable = enable or base.gradient_checkpointing_enable  # transformers < 5.23
            enable({"use_reentrant": use_reentrant})
        model = get_peft_model(base, config(name)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**make_batch(name)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for n, gradient in plain.items():
        assert_close(checkpointed[n], gradient, **TOL[torch.float32])


def test_two_forwards_before_one_backward(name):
    model = adapted(name)
    batch = make_batch(name)
    values = [p for n, p in model.named_parameters() if "irdelta" in n]
    (model(**batch).loss + model(**batch).loss).backward()
    twice = [p.grad.clone() for p in values]
    model.zero_grad()
    model(**batch).loss.backward()
    for p, gradient in zip(values, twice, strict=True):
        assert_close(gradient, 2 * p.grad, **TOL[torch.float32])


def test_input_embeds(name):
    model = adapted(name, target_modules="all-linear")
    batch = make_batch(name)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    output = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generate(kind):
    model = adapted(kind)
    ids = make_batch(kind)["input_ids"][:1]
    merged = copy.deepcopy(model).merge_and_unload()
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    found = model.generate(input_ids=ids, **options)
    assert torch.equal(found, merged.generate(input_ids=ids, **options))
    assert torch.equal(model.generate(ids, **options), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_keep_float32_values(name, dtype):
    torch.manual_seed(1)
    model = get_peft_model(make_model(name).to(dtype), config(name)).eval()
    values = [p for n, p in model.named_parameters() if "irdelta" in n]
    assert {p.dtype for p in values} == {torch.float32}
    output = logits(model, name)
    assert output.dtype == dtype
    assert output.isfinite().all()
    without = get_peft_model(
        make_model(name).to(dtype), config(name), autocast_adapter_dtype=False
    )
    kept = {p.dtype for n, p in without.named_parameters() if "irdelta" in n}
    assert kept == {dtype}


def test_autocast_runs_and_learns(name):
    model = adapted(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**make_batch(name)).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiled_models_have_no_graph_break(name):
    torch.compiler.reset()
    model = adapted(name, density=0.2)
    batch = {k: v for k, v in make_batch(name).items() if k != "labels"}
    expected = model(**batch).logits
    values = [p for n, p in model.named_parameters() if "irdelta" in n]
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in values]
    model.zero_grad()
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        output = compiled(**batch).logits
    output.square().sum().backward()
    assert_close(output, expected, **TOL[torch.float32])
    for p, gradient in zip(values, gradients, strict=True):
        assert_close(p.grad, gradient, **TOL[torch.float32])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_compiled_model_takes_what_its_state_dict_has(name):
    model, other = adapted(name), torch.compile(adapted(name, seed=1))
    state_dict = get_peft_model_state_dict(torch.compile(model))
    assert all(key.startswith("_orig_mod.") for key in state_dict)
    found = set_peft_model_state_dict(other, state_dict)
    assert not found.unexpected_keys
    assert torch.equal(logits(other._orig_mod, name), logits(model, name))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_saving_from_a_compiled_model(name):
    torch.compiler.reset()
    model = adapted(name)
    plain = get_peft_model_state_dict(model)
    compiled = get_peft_model_state_dict(torch.compile(model), unwrap_compiled=True)
    assert plain.keys() == compiled.keys()
    settings, empty = config(name), torch.compile(make_model(name))
    state_dict = {k.removeprefix("base_model.model."): v for k, v in plain.items()}
    injected = inject_adapter_in_model(settings, empty, state_dict=state_dict)
    assert sum(isinstance(m, IRDLayer) for m in injected.modules()) > 0
    assert settings.nnz_pattern == model.peft_config["default"].nnz_pattern


def test_weights_that_shadow_parameters_are_replaced():
    """As FSDP does: the module finds its weight in its __dict__."""
    torch.manual_seed(0)
    settings = IRDConfig(density=0.9, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), settings)
    x = torch.randn(2, 3)
    expected = model(x)
    layer = model.base_model.model[0]
    read = {name: getattr(layer, name) for name in ("weight", "bias")}
    for name, tensor in read.items():
        assert not torch.equal(tensor, getattr(layer.base_layer, name))
        layer.base_layer.__dict__[name] = layer.base_layer._parameters.pop(name).data
    assert torch.equal(model(x), expected)
    assert all(torch.equal(getattr(layer, name), read[name]) for name in read)


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("lora_target", ["query", "key"])
def test_lora_and_ird_in_one_mixed_model(lora_first, lora_target):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=[lora_target], init_lora_weights=False)
    ird = IRDConfig(
        budget=300, method="random", target_modules=["query"], init_weights=False
    )
    first, second = (lora, ird) if lora_first else (ird, lora)
    base = make_model("bert")
    expected = logits(base, "bert")
    model = get_peft_model(base, first, adapter_name="first", mixed=True).eval()
    assert isinstance(model, PeftMixedModel)
    model.add_adapter("second", second)
    alone = logits(model, "bert")
    entries = [p.numel() for n, p in model.named_parameters() if "irdelta" in n]
    assert sum(entries) == 300
    model.set_adapter(["first", "second"])
    both = logits(model, "bert")
    assert not torch.equal(alone, both)
    with model.disable_adapter():
        assert_close(logits(model, "bert"), expected)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(logits(merged, "bert"), both, **TOL[torch.float32])
    model.delete_adapter("second")
    model.set_adapter("first")
    assert_close(logits(model, "bert"), alone)
    assert_close(logits(model.unload(), "bert"), expected)


def mixed_model(base: nn.Module, *targets: list[str]) -> PeftMixedModel:
    """A LoRA and an IRD adapter, both active, in modules of these names."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=targets[0], init_lora_weights=False)
    ird = IRDConfig(density=0.5, method="random", init_weights=False)
    ird.target_modules = targets[-1]
    model = get_peft_model(base, lora, "low", mixed=True)
    model.add_adapter("sparse", ird)
    return model.eval()


def test_a_forced_way_leaves_nothing_of_others_out():
    model = mixed_model(make_model("bert"), ["query"])
    model.set_adapter(["low", "sparse"])
    expected = logits(model, "bert")
    for way in ("in_weight", "separate"):
        with ways.forced(way=way):
            assert_close(logits(model, "bert"), expected, **TOL[torch.float32])


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_a_tied_head_inside_another_tuners_layer_has_the_delta_once():
    settings = {"method": "random", "init_weights": False}
    model = get_peft_model(
        make_model("gpt2"),
        IRDConfig(density=0.1, target_modules=["wte"], **settings),
        adapter_name="table",
        mixed=True,
    ).eval()
    model.add_adapter("low", LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter(["table"])
    expected = logits(model, "gpt2")
    other = IRDConfig(budget=5, target_modules=["c_fc"], **settings)
    model.add_adapter("other", other)
    model.set_adapter(["table"])
    assert_close(logits(model, "gpt2"), expected)


@pytest.mark.parametrize("order", [["low", "sparse"], ["sparse", "low"]])
@pytest.mark.parametrize("finish", ["unmerge", "set_adapter", "disable"])
@pytest.mark.filterwarnings("ignore:Adapter cannot be set:UserWarning")
def test_what_two_tuners_merged_is_unmerged(order, finish):
    base = make_model("bert")
    expected = logits(base, "bert")
    model = mixed_model(base, ["query", "dense"])
    model.set_adapter(order)
    model.merge_adapter()
    assert not torch.allclose(logits(model, "bert"), expected)
    if finish == "disable":
        with model.disable_adapter():
            found = logits(model, "bert")
    else:
        if finish == "unmerge":
            model.unmerge_adapter()
        else:
            model.set_adapter("sparse")
        found = logits(model.unload(), "bert")
    assert_close(found, expected, **TOL[torch.float32])


class Block(nn.Module):
    """A module with a parameter of its own around others."""

    def __init__(self, is_shared: bool) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.ones(4))
        self.lin = nn.Linear(4, 4)
        self.again = self.lin if is_shared else nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.lin(x) * self.b)


class Blocks(nn.Module):
    def __init__(self, is_shared: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), Block(is_shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def blocks(is_shared: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Blocks(is_shared)


@pytest.mark.parametrize("finish", ["unload", "merge_and_unload"])
def test_a_mixed_model_is_unloaded_down_to_the_last_module(finish):
    base, x = blocks(is_shared=True), torch.randn(2, 4)
    names = list(base.state_dict())
    model = mixed_model(base, ["first"], ["first", "second", "second.lin"])
    model.set_adapter(["low", "sparse"])
    expected = base(x) if finish == "merge_and_unload" else blocks(is_shared=True)(x)
    left = getattr(model, finish)()
    assert list(left.state_dict()) == names
    assert left.second.again is left.second.lin
    assert_close(left(x), expected)


@pytest.mark.parametrize("how", ["peft", "mixed", "native"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_all_layers_agree_on_who_follows_a_deleted_adapter(how):
    """Five entries each: no layer has some of all three adapters."""
    model = make_model("gpt2")
    for seed, each in enumerate("xyz"):
        settings = config("gpt2", budget=5, density=None, seed=seed)
        if how == "native":
            model.add_adapter(settings, each)
        elif each == "x":
            model = get_peft_model(model, settings, each, mixed=how == "mixed")
        else:
            model.add_adapter(each, settings)
    model.eval().set_adapter("y")
    expected = logits(model, "gpt2")
    model.set_adapter("x")
    with pytest.warns(UserWarning, match="Setting active adapter to y"):
        model.delete_adapter("x")
    assert torch.equal(logits(model, "gpt2"), expected)
    layers = [m for m in model.modules() if isinstance(m, IRDLayer)]
    assert {tuple(layer.active_adapters) for layer in layers} == {("y",)}


def test_no_adapter_has_the_name_of_an_adapted_parameter():
    """PEFT would take its neighbours' biases for its own when it saves them."""
    settings = config("gpt2", method="bias", density=None)
    model = make_model("gpt2")
    keys = list(model.state_dict())
    message = r"cannot be called 'bias'.*`adapter_name`"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, settings, "bias")
    assert list(model.state_dict()) == keys
    model = get_peft_model(model, config("gpt2", target_modules=["wte"]), "bias")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"cannot be called 'bias'.*`exclude_modules`"):
        model.add_adapter("other", settings)
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="cannot be called 'wte'"):
        model.add_adapter("wte", config("gpt2", target_modules=["wte"]))


def test_a_tied_head_that_is_trained_whole_is_warned_of_as_in_lora():
    for settings in (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        config("llama", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        with pytest.warns(UserWarning, match="`tie_word_embeddings=True` and a tied"):
            get_peft_model(make_model("llama"), settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(make_model("llama"), config("llama", density=0.5))


def test_a_saved_adapter_is_not_loaded_under_a_head(tmp_path):
    adapted("bert", density=1.0).save_pretrained(tmp_path)
    other = adapted("bert", target_modules=["query"])
    settings = IRDConfig.from_pretrained(tmp_path)
    settings.modules_to_save = ["query"]
    with pytest.raises(ValueError, match=r"`modules_to_save` covers '.*query'"):
        other.add_adapter("second", settings)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_an_exported_model_is_saved_and_loaded():
    model, batch = adapted("bert", density=0.5), make_batch("bert")
    del batch["labels"]
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (), batch, strict=False), buffer)
    buffer.seek(0)
    with torch.no_grad():
        found = torch.export.load(buffer).module()(**batch).logits
        assert_close(found, model(**batch).logits, **TOL[torch.float32])


@pytest.mark.parametrize("target", [None, "all-linear"])
def test_a_model_is_offloaded_with_its_adapters(name, target):
    model = adapted(name, target_modules=target, density=0.3).double()
    model.add_adapter("second", config(name, seed=1))
    model.base_model.set_adapter(
        ["default"] if task_type(name) == "SEQ_CLS" else ["default", "second"]
    )
    expected = logits(model, name)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        # Where weights are not at hand, the share of norms is computed in float32.
        found = logits(model, name).float()
        assert_close(found, expected.float(), **TOL[torch.float32])
        values = [p for n, p in model.named_parameters() if "irdelta_values" in n]
        assert all(p.is_meta for p in values)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_an_adapter_is_loaded_for_layers_on_disk(
    low_cpu_mem_usage, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # transformers writes to the working directory
    model = adapted("bert", target_modules=["query"], density=0.3)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, "bert")
    base = make_model("bert")
    base.save_pretrained(tmp_path / "base")
    parts = {name: "cpu" for name, m in base.named_modules() if not [*m.children()]}
    parts["bert.encoder.layer.1"] = "disk"
    parts = {
        n: d for n, d in parts.items() if not n.startswith("bert.encoder.layer.1.")
    }
    base = type(base).from_pretrained(
        tmp_path / "base", device_map=parts, offload_folder=tmp_path / "off"
    )
    loaded = PeftModel.from_pretrained(
        base,
        tmp_path / "adapter",
        low_cpu_mem_usage=low_cpu_mem_usage,
        device_map={f"base_model.model.{name}": d for name, d in parts.items()},
        offload_folder=tmp_path / "off",
    )
    assert_close(logits(loaded, "bert"), expected)


@pytest.mark.parametrize("mixed", [True, False])
def test_casting_of_inputs_is_turned_off_and_on(mixed):
    other = LoraConfig(target_modules=["first"])
    model = get_peft_model(blocks(), other if mixed else sparse("first"), mixed=mixed)
    model.add_adapter("other", sparse("second.lin"))
    layers = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
    assert all(layer.cast_input_dtype_enabled for layer in layers)
    assert len(layers) == 2


def sparse(*targets: str) -> IRDConfig:
    targets = [*targets]
    return IRDConfig(
        density=0.5, method="random", target_modules=targets, init_weights=False
    )


@pytest.mark.parametrize("targets", [["second"], ["second", "second.lin"]])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_an_adapter_is_added_inside_what_another_has_wrapped(targets, is_frozen):
    x = torch.randn(2, 4)
    model = get_peft_model(blocks(), sparse(*targets), "outer")
    before = model(x)
    model.set_requires_grad("outer", not is_frozen)
    model.add_adapter("inner", sparse("second.lin"))
    assert torch.equal(model(x), before)
    flags = {
        each: {p.requires_grad for n, p in model.named_parameters() if each in n}
        for each in (".outer.", ".inner.")
    }
    assert flags == {".outer.": {not is_frozen}, ".inner.": {False}}
    assert model.peft_config["inner"].target_modules == {"second.lin"}
    model.set_adapter("inner")
    alone = get_peft_model(blocks(), sparse("second.lin"), "inner")
    load_values(alone, model)
    assert_close(model(x), alone(x))


def load_values(model: PeftModel, other: PeftModel) -> None:
    """Give an adapter the values that it has in another model."""
    state_dict = get_peft_model_state_dict(other, adapter_name="inner")
    result = set_peft_model_state_dict(model, state_dict, adapter_name="inner")
    assert not result.unexpected_keys


@pytest.mark.parametrize("order", [["inner", "outer"], ["outer", "inner"]])
def test_files_do_not_tell_which_other_adapters_there_were(order, tmp_path):
    x = torch.randn(2, 4)
    targets = {"outer": ["first", "second"], "inner": ["second.lin"]}
    model = get_peft_model(blocks(), sparse(*targets[order[0]]), order[0])
    model.add_adapter(order[1], sparse(*targets[order[1]]))
    model.save_pretrained(tmp_path)
    expected = {}
    for each in order:
        model.set_adapter(each)
        expected[each] = model(x)
        loaded = PeftModel.from_pretrained(blocks(), tmp_path / each)
        assert torch.equal(loaded(x), expected[each])
    for first, second in (order, order[::-1]):
        both = PeftModel.from_pretrained(blocks(), tmp_path / first, first)
        both.load_adapter(tmp_path / second, second)
        for each in order:
            both.set_adapter(each)
            assert torch.equal(both(x), expected[each])


class Reward(nn.Module):
    """A model around another, under the name that PEFT uses as well."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.base_model = inside
        self.score = nn.Linear(inside.config.vocab_size, 1)

    def forward(self, **batch):
        return self.score(self.base_model(**batch).logits)


def test_a_model_with_a_base_model_of_its_own_is_saved(tmp_path):
    def made():
        torch.manual_seed(0)
        return Reward(make_model("llama"))

    settings = IRDConfig(density=0.1, method="random", init_weights=False)
    model, batch = get_peft_model(made(), settings).eval(), make_batch("llama")
    batch.pop("labels", None)
    with torch.no_grad():
        expected = model(**batch)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(made(), tmp_path).eval()(**batch)
    assert torch.equal(loaded, expected)


@pytest.mark.filterwarnings(
    "ignore:.*(second time|`peft_config` attribute):UserWarning"
)
def test_a_model_around_another_adapter_is_refused():
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    names = [name for name, _ in model.named_modules()]
    settings = dict(model.peft_config)
    with pytest.raises(ValueError, match=r"is a PeftModelForCausalLM .*mixed="):
        get_peft_model(model, IRDConfig(density=0.1, method="random"))
    assert [name for name, _ in model.named_modules()] == names
    assert model.peft_config == settings


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_layers_that_are_compiled_are_adapted(targets, tmp_path):
    model = make_model("llama")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    settings = IRDConfig(
        density=0.3, method="random", target_modules=targets, init_weights=False
    )
    model, batch = get_peft_model(model, settings).eval(), make_batch("llama")
    found = {name for name in names if name != "lm_head"}
    assert found <= set(settings.nnz_pattern)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("adapter_name", ["model", "base_model", "a.b", "keys"])
def test_names_that_peft_cannot_tell_apart_are_refused(adapter_name, monkeypatch):
    model = adapted("bert")
    keys = list(model.state_dict())
    if adapter_name not in {"model", "base_model"}:  # before a selection, which is long
        monkeypatch.setattr("peft_ird.model.settle", None)
    with pytest.raises(ValueError, match=f"cannot be called '{adapter_name}'"):
        model.add_adapter(adapter_name, config("bert"))
    assert list(model.state_dict()) == keys


class Memory(nn.Module):
    """Has parameters that are called like a dictionary's methods."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x @ self.keys.t()


def test_parameters_that_no_dictionary_takes_are_refused_early():
    model = nn.Sequential(nn.Linear(4, 4), Memory())
    settings = IRDConfig(density=0.5, method="random", init_weights=False)
    with pytest.raises(ValueError, match=r"'1\.keys' cannot be adapted.*`exclude_"):
        get_peft_model(model, settings)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    settings.exclude_modules = ["1"]
    get_peft_model(model, settings)


class Outer(nn.Module):
    """A module with a parameter of its own and a linear layer inside."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * self.scale


def test_all_linear_reaches_into_modules_that_another_adapter_wrapped():
    def model():
        return nn.Sequential(Outer(), nn.Linear(4, 4))

    settings = {"density": 1.0, "method": "random"}
    expected = select_parameters(
        model(), IRDConfig(target_modules="all-linear", **settings)
    )
    wrapped = get_peft_model(model(), IRDConfig(**settings))
    wrapped.add_adapter("second", IRDConfig(target_modules="all-linear", **settings))
    pattern = wrapped.peft_config["second"].nnz_pattern
    assert pattern == expected.counts
    assert "0.inner" in pattern


def test_the_same_layer_is_found_under_another_tuners():
    torch.manual_seed(0)
    options = {"target_modules": ["query"], "density": 0.1}
    model = get_peft_model(make_model("bert"), config("bert", **options), mixed=True)
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    model.add_adapter("lora", lora)
    model.add_adapter("second", config("bert", seed=1, **options))
    layers = [m for m in model.modules() if isinstance(m, IRDLayer)]
    assert len(layers) == 2  # one for each query
    assert all({"default", "second"} == {*layer.irdelta_values} for layer in layers)
    model.set_adapter(["default", "lora", "second"])
    expected = logits(model.eval(), "bert")
    model.merge_adapter()
    assert_close(logits(model, "bert"), expected)
