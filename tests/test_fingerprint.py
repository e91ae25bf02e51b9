"""What an adapter says of its origin, and loading it onto the wrong weights."""

import copy
import hashlib
import json
import re

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_ird import IRDConfig, ignoring_base_mismatch, select_parameters
from peft_ird.layers.layer import IRDLayer
from tests.conftest import make_batch, make_model, make_samples, task_type


def adapted(name: str, **options) -> PeftModel:
    torch.manual_seed(1)
    options = {"density": 0.02, "method": "random", "init_weights": False, **options}
    config = IRDConfig(task_type=task_type(name), **options)
    return get_peft_model(make_model(name), config).eval()


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**make_batch(name)).logits


def settings_of(folder) -> dict:
    return PeftConfig.from_pretrained(folder).to_dict()


def refused(folder, model, message="made for other base weights: those of"):
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def changed(name: str, folder) -> nn.Module:
    """The base model with one entry moved that the adapter has."""
    model = make_model(name)
    loaded = PeftModel.from_pretrained(make_model(name), folder)
    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in loaded.named_modules()
        if isinstance(m, IRDLayer) and m.entry_counts("default")
    }
    module, layer = max(layers.items())
    parameter, indices = next(iter(layer._indices("default").items()))
    weight = model.get_submodule(module).get_parameter(parameter)
    weight.data.view(-1)[int(indices[-1])] += 1.0
    return model


@pytest.fixture
def saved(name, tmp_path):
    adapted(name).save_pretrained(tmp_path)
    return tmp_path


def test_the_hash_is_that_of_the_entries_rounded(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 4))
    config = IRDConfig(budget=9, method="random", init_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    layer = model.base_model.model[0]
    digest = {kind: hashlib.blake2b(digest_size=8) for kind in ("bfloat16", "float16")}
    for parameter, indices in sorted(layer.irdelta_indices["default"].items()):
        flat = layer.base_layer.get_parameter(parameter).flatten()
        for kind, one in digest.items():
            one.update(parameter.encode() + b"\0")
            for index in indices.tolist():
                rounded = flat[index].detach().to(getattr(torch, kind))
                one.update(rounded.view(torch.int16).numpy().tobytes())
    expected = {kind: one.hexdigest() for kind, one in digest.items()}
    assert settings_of(tmp_path)["fingerprint"] == {"0": expected}


def test_another_base_is_refused_before_anything_changes(name, saved):
    refused(saved, changed(name, saved))
    refused(saved, make_model(name, seed=5))


def test_an_entry_that_the_adapter_lacks_may_differ(name, saved):
    model = make_model(name)
    loaded = PeftModel.from_pretrained(make_model(name), saved)
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            free = torch.ones(parameter.numel(), dtype=torch.bool)
            layer = loaded.base_model.model.get_submodule(module_name)
            found = layer._indices("default") if isinstance(layer, IRDLayer) else {}
            if parameter_name in found:
                free[found[parameter_name].long()] = False
            if "lm_head" not in module_name:
                parameter.data.view(-1)[free] = 0.25
    PeftModel.from_pretrained(model, saved)


def test_the_check_can_be_left_out(name, saved):
    other = changed(name, saved)
    config = PeftConfig.from_pretrained(saved)
    config.ignore_base_mismatch = True
    loaded = PeftModel.from_pretrained(copy.deepcopy(other), saved, config=config)
    again = PeftModel.from_pretrained(other, saved, ignore_base_mismatch=True)
    assert torch.equal(logits(loaded, name), logits(again, name))
    assert "ignore_base_mismatch" not in settings_of(saved)


@pytest.mark.parametrize("how", ["load_adapter", "auto", "native"])
def test_the_check_is_left_out_however_it_is_loaded(how, tmp_path):
    kind = "gpt2"
    folder, base = tmp_path / "adapter", tmp_path / "base"
    make_model(kind).save_pretrained(base)
    model = adapted(kind)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    changed(kind, folder).save_pretrained(base)

    def load() -> torch.Tensor:
        if how == "auto":
            return logits(AutoPeftModelForCausalLM.from_pretrained(folder), kind)
        model = changed(kind, folder)
        if how == "native":
            model.load_adapter(str(folder), "second")
        else:
            model = get_peft_model(model, IRDConfig(method="bias"))
            model.load_adapter(folder, "second")
            model.set_adapter("second")
        return logits(model, kind)

    with pytest.raises(ValueError, match=r"with peft_ird\.ignoring_base_mismatch\(\)"):
        load()
    with ignoring_base_mismatch():
        found = load()
    other = changed(kind, folder)
    loaded = PeftModel.from_pretrained(other, folder, ignore_base_mismatch=True)
    assert torch.equal(found, logits(loaded, kind))
    with pytest.raises(ValueError, match="made for other base weights"):
        load()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_embeddings_that_are_saved_whole_need_not_be_those_of_the_base(kind, tmp_path):
    """A vocabulary that was enlarged: its new rows are random in every model."""

    def enlarged(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = make_model(kind)
        model.resize_token_embeddings(45)
        return model

    torch.manual_seed(0)
    config = IRDConfig(density=0.3, method="random", init_weights=False)
    model = get_peft_model(enlarged(1), config).eval()
    expected = logits(model, kind)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(enlarged(2), tmp_path)
    assert torch.equal(logits(loaded, kind), expected)
    other = enlarged(2)
    blocks = other.get_submodule("bert.encoder" if kind == "bert" else "model.layers")
    for parameter in blocks.parameters():
        parameter.data += 1.0
    refused(tmp_path, other)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_that_the_base_is_loaded_in_is_no_mismatch(stored, loaded, tmp_path):
    """A checkpoint in float32, whichever types it is loaded in."""
    config = IRDConfig(task_type="SEQ_CLS", density=0.1, method="random")
    get_peft_model(make_model("bert").to(stored), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_model("bert").to(loaded), tmp_path)
    wrong = make_model("bert", seed=1).to(loaded)
    if stored == loaded or torch.float32 in {stored, loaded}:
        refused(tmp_path, wrong)


@pytest.mark.filterwarnings("ignore:.*merged:UserWarning")
def test_a_merged_adapter_has_the_fingerprint_of_the_originals(name, tmp_path):
    model = adapted(name, density=0.5)
    second = IRDConfig(density=0.5, method="random", seed=1, init_weights=False)
    model.add_adapter("second", second)
    model.save_pretrained(tmp_path / "plain")
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    model.save_pretrained(tmp_path / "merged")
    for folder in (".", "second"):
        plain, merged = (
            settings_of(tmp_path / state / folder)["fingerprint"]
            for state in ("plain", "merged")
        )
        assert plain == merged
        assert len(plain) == len(model.peft_config["second"].nnz_pattern)


@pytest.mark.filterwarnings("ignore:.*merged:UserWarning")
def test_loading_beside_a_merged_adapter(name, saved):
    model = adapted(name, density=0.5, seed=3)
    model.merge_adapter()
    model.load_adapter(saved, "second")
    assert "second" in model.peft_config


def test_a_second_adapter_on_the_wrong_base_leaves_the_first(name, saved):
    torch.manual_seed(1)
    config = IRDConfig(
        task_type=task_type(name), density=0.1, method="random", init_weights=False
    )
    model = get_peft_model(make_model(name, seed=5), config)
    before = logits(model, name)
    with pytest.raises(ValueError, match="made for other base weights"):
        model.load_adapter(saved, "second")
    assert torch.equal(logits(model, name), before)
    assert not any(".second" in key for key in model.state_dict())


def test_transformers_own_loading_is_checked_at_the_first_forward(name, saved):
    right, wrong = make_model(name), changed(name, saved)
    for model in (right, wrong):
        model.load_adapter(str(saved))
    logits(right, name)
    with pytest.raises(ValueError, match=r"other base weights.*ignoring_base") as error:
        logits(wrong, name)
    named = set(re.findall(r"than those of '(.+?)'", str(error.value)))
    assert len(named) == 1
    assert named <= set(settings_of(saved)["nnz_pattern"])


def test_weights_that_are_not_at_hand_are_not_compared(tmp_path):
    config = IRDConfig(budget=5, method="random")
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    PeftModel.from_pretrained(model, tmp_path)


def test_the_origin_is_recorded(tmp_path):
    data = make_samples("bert")
    model = adapted("bert", method="ird", num_samples=8, calibration=data, seed=7)
    model.base_model.model.name_or_path = None
    model.save_pretrained(tmp_path)
    found = settings_of(tmp_path)
    assert found["format_version"] == 3
    origin = found["provenance"]
    assert origin["method"] == "ird"
    assert origin["seed"] == 7
    assert origin["num_samples"] == 8
    assert 1 <= origin["samples_kept"] == len(origin["samples"]) < 8
    assert set(origin["samples"]) <= set(range(len(data)))
    assert origin["stages"][0][0] == 8
    assert origin["stages"][-1][1] == 0.02
    assert set(origin["versions"]) == {"peft_ird", "torch", "peft", "transformers"}
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = settings_of(tmp_path / "again")
    assert all(again[k] == found[k] for k in ("provenance", "fingerprint"))


def test_a_newer_format_is_refused(saved, name):
    path = saved / "adapter_config.json"
    settings = {**settings_of(saved), "format_version": 4, "nnz_pattern": {"a": "new"}}
    path.write_text(json.dumps(settings))
    message = "`format_version` 4; this version of peft_ird reads up to 3. Upgrade"
    refused(saved, make_model(name), message)


def test_a_given_selection_says_how_it_was_chosen(tmp_path):
    chosen = IRDConfig(density=0.1, method="magnitude", seed=3)
    model = make_model("bert")
    selection = select_parameters(model, chosen)
    config = IRDConfig(selection=selection)
    get_peft_model(model, config).save_pretrained(tmp_path)
    found = settings_of(tmp_path)
    assert (found["method"], found["seed"]) == ("magnitude", 3)
    assert found["provenance"]["method"] == "magnitude"
