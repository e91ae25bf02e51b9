"""An adapter on disk: what is in it, and every way back."""

import copy
import importlib
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from peft_ird import Calibration, IRDConfig, _registration
from peft_ird.layers import holding
from peft_ird.layers.layer import IRDLayer
from tests import oracles
from tests.conftest import make_batch, make_model, make_samples, task_type

AUTO = {
    "SEQ_CLS": (
        AutoPeftModelForSequenceClassification,
        AutoModelForSequenceClassification,
    ),
    "CAUSAL_LM": (AutoPeftModelForCausalLM, AutoModelForCausalLM),
}


def config(name: str, **options) -> IRDConfig:
    options = {"density": 0.02, "method": "random", "init_weights": False, **options}
    return IRDConfig(task_type=task_type(name), **options)


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**make_batch(name)).logits


@pytest.fixture
def trained(name, tmp_path):
    """A base model on disk, an adapter of it beside it, and its predictions."""
    base = make_model(name)
    base.save_pretrained(tmp_path / "base")
    base = AUTO[task_type(name)][1].from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, config(name))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model, name)


def test_the_file_holds_indices_values_and_the_head(trained):
    folder, _ = trained
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    pattern = PeftConfig.from_pretrained(folder / "adapter").nnz_pattern
    kinds = {k.split(".irdelta_")[-1].split(".")[0] for k in tensors if "irdelta" in k}
    assert kinds == {"coded", "values"}
    rest = {k for k in tensors if "irdelta" not in k}
    assert all("classifier" in k for k in rest)
    base = dict(AUTO["SEQ_CLS" if rest else "CAUSAL_LM"][1].from_pretrained(
        folder / "base").named_modules())  # fmt: skip
    for module, counts in pattern.items():
        sizes = {n: p.numel() for n, p in base[module].named_parameters(recurse=False)}
        prefix = f"base_model.model.{module}.irdelta_"
        coded = bytes(tensors[f"{prefix}coded"].tolist())
        found = oracles.decoded_module(coded, {n: sizes[n] for n in counts}, counts)
        for parameter, count in counts.items():
            values = tensors[f"{prefix}values.{parameter}"]
            assert values.dtype == torch.float32
            assert len(found[parameter]) == len(values) == count
    entries = sum(k for counts in pattern.values() for k in counts.values())
    assert sum(t.numel() for k, t in tensors.items() if "values" in k) == entries


def test_the_adapter_comes_back_in_every_way(name, trained):
    folder, expected = trained
    auto_peft, auto = AUTO[task_type(name)]
    adapter = folder / "adapter"
    base = auto.from_pretrained(folder / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter), name), expected)
    assert torch.equal(logits(auto_peft.from_pretrained(adapter), name), expected)
    native = auto.from_pretrained(folder / "base")
    info = native.load_adapter(str(adapter))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(logits(native, name), expected)
    direct = auto.from_pretrained(str(adapter))
    assert torch.equal(logits(direct, name), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_native_adapters_of_transformers(name):
    model = make_model(name)
    base = logits(model, name)
    torch.manual_seed(1)
    model.add_adapter(config(name), "one")
    one = logits(model, name)
    assert not torch.equal(one, base)
    model.add_adapter(config(name, seed=2), "two")
    two = logits(model, name)
    model.set_adapter("one")
    assert torch.equal(logits(model, name), one)
    model.disable_adapters()
    assert torch.equal(logits(model, name), base)
    model.enable_adapters()
    assert torch.equal(logits(model, name), one)
    model.set_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(logits(model, name), two)
    state = model.get_adapter_state_dict("two")
    assert state
    assert all("irdelta" in key for key in state)


def test_native_selection_on_data(name, tmp_path):
    model = make_model(name)
    options = {"method": "ird", "num_samples": 8, "calibration": make_samples(name)}
    model.add_adapter(config(name, modules_to_save=None, **options), "one")
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    loaded = make_model(name)
    loaded.load_adapter(str(tmp_path), "one")
    assert torch.equal(logits(loaded, name), expected)


SCRIPT = """
import sys, torch, peft_ird
from peft import {auto}
adapter, batch, expected = sys.argv[1:]
model = {auto}.from_pretrained(adapter).eval()
with torch.no_grad():
    found = model(**torch.load(batch)).logits
sys.exit(0 if torch.equal(found, torch.load(expected)) else "other predictions")
"""


def run(script: str, *args: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )


@pytest.mark.slow
def test_a_fresh_process_predicts_the_same(name, trained):
    folder, _ = trained
    auto = AUTO[task_type(name)][0].__name__
    torch.save(make_batch(name), folder / "batch.pt")
    expected = AUTO[task_type(name)][0].from_pretrained(folder / "adapter")
    torch.save(logits(expected, name), folder / "logits.pt")
    threads = "import os; os.environ['OMP_NUM_THREADS'] = '1'\n"
    done = run(
        threads + SCRIPT.format(auto=auto),
        folder / "adapter", folder / "batch.pt", folder / "logits.pt",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def half_of(write):
    """A writer that is interrupted in the middle of its file."""

    def interrupted(*args, **kwargs):
        write(*args, **kwargs)
        place = Path(next(a for a in args if isinstance(a, str | Path)))
        path = place / "adapter_config.json" if place.is_dir() else place
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise KeyboardInterrupt

    return interrupted


@pytest.mark.parametrize("file", ["weights", "configuration"])
def test_an_interrupted_save_leaves_the_files_before(file, tmp_path, monkeypatch):
    model = get_peft_model(make_model("bert"), config("bert"))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    owner, attribute = {
        "weights": (_registration, "_save_file_of_peft"),
        "configuration": (PeftConfig, "save_pretrained"),
    }[file]
    monkeypatch.setattr(owner, attribute, half_of(getattr(owner, attribute)))
    model.peft_config["default"].seed = 7
    for parameter in model.parameters():
        parameter.data.add_(1)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = {n for n in before if after[n] != before[n]} - {"README.md"}
    assert after.keys() == before.keys()
    assert changed <= ({"adapter_model.safetensors"} if file != "weights" else set())


def test_other_tuners_are_written_as_peft_writes_them(tmp_path, monkeypatch):
    written = []
    write = _registration._save_file_of_peft

    def noted(tensors, path, **kwargs):
        written.append(Path(path))
        write(tensors, path, **kwargs)

    monkeypatch.setattr(_registration, "_save_file_of_peft", noted)
    lora = get_peft_model(make_model("bert"), LoraConfig(task_type="SEQ_CLS"))
    lora.save_pretrained(tmp_path)
    assert written == [tmp_path / "adapter_model.safetensors"]


def test_a_reloaded_module_still_writes(tmp_path):
    write = _registration._save_file_of_peft
    importlib.reload(_registration)
    assert _registration._save_file_of_peft is write
    lora = get_peft_model(make_model("bert"), LoraConfig(task_type="SEQ_CLS"))
    lora.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_model_card_says_what_to_import(trained):
    folder, _ = trained
    card = (folder / "adapter" / "README.md").read_text()
    assert card.count("import peft_ird") == 1


def test_saving_again_keeps_one_hint(name, tmp_path):
    model = get_peft_model(make_model(name), config(name))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import peft_ird") == 1


def test_the_embedding_is_not_saved_along(tmp_path):
    model = get_peft_model(make_model("llama-untied"), config("llama-untied"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all("irdelta" in key for key in tensors)


def test_pickled_weights_come_back_too(name, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(make_model(name), config(name))
    model.save_pretrained(tmp_path, safe_serialization=False)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path)
    assert torch.equal(logits(loaded, name), logits(model, name))


def test_several_adapters_are_saved_and_loaded_by_name(name, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(make_model(name), config(name), "one")
    model.add_adapter("two", config(name, seed=2))
    model.set_adapter("two")
    two = logits(model, name)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"one", "two"}
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path / "one", "one")
    loaded.load_adapter(tmp_path / "two", "two")
    loaded.set_adapter("two")
    assert torch.equal(logits(loaded, name), two)


def test_another_file_can_be_loaded_under_the_same_name(name, tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(make_model(name), config(name, seed=seed))
        model.save_pretrained(tmp_path / str(seed))
    expected = logits(model, name)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path / "1")
    loaded.load_adapter(tmp_path / "2", "default")
    assert torch.equal(logits(loaded, name), expected)


def test_an_embedding_with_more_rows_still_fits(name, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(make_model(name), config(name, density=0.2))
    model.save_pretrained(tmp_path)
    expected = logits(model, name)
    base = make_model(name)
    base.resize_token_embeddings(44)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    found = logits(loaded, name)
    assert torch.equal(found[..., : expected.shape[-1]], expected)


def test_a_loaded_adapter_goes_on_training(name, trained):
    folder, _ = trained
    base = AUTO[task_type(name)][1].from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    model(**make_batch(name)).loss.backward()
    values = [p for n, p in model.named_parameters() if "irdelta" in n]
    assert all(p.grad is not None for p in values)
    frozen = PeftModel.from_pretrained(
        AUTO[task_type(name)][1].from_pretrained(folder / "base"), folder / "adapter"
    )
    assert not any(p.requires_grad for p in frozen.parameters())


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_save_then_load_is_the_identity(data, tmp_path):
    """Budgets from one entry to all of it, of any kind of parameter."""
    size = sum(p.numel() for p in make_model("bert").bert.parameters())
    budget = data.draw(
        st.one_of(st.integers(1, 40), st.integers(1, size), st.just(size))
    )
    seed = data.draw(st.integers(0, 1000))
    settings_ = config("bert", density=None, budget=budget, seed=seed)
    torch.manual_seed(seed)
    model = get_peft_model(make_model("bert"), settings_)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path)
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    entries = sum(v.numel() for k, v in theirs.items() if "irdelta_values" in k)
    assert entries == budget
    before = {k: v.clone() for k, v in theirs.items()}
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())


def test_the_configuration_is_json_without_its_data(tmp_path):
    data = Calibration(make_samples("bert"))
    schedule = [(8, 0.1), (4, 0.02)]
    settings = config("bert", method="ird", schedule=schedule, calibration=data)
    get_peft_model(make_model("bert"), settings)
    assert settings.calibration is data
    settings.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "calibration" not in written
    assert "selection" not in written
    assert written["peft_type"] == "IRD"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, IRDConfig)
    assert loaded.schedule == schedule
    assert loaded.to_dict() == {**settings.to_dict(), "schedule": schedule}


def test_copies_share_the_data_and_pickles_leave_it_out():
    data = Calibration(make_samples("bert"))
    settings = config("bert", calibration=data)
    assert copy.deepcopy(settings).calibration is data
    assert copy.copy(settings).calibration is data
    assert pickle.loads(pickle.dumps(settings)).calibration is None
    assert settings.to_dict() == copy.deepcopy(settings).to_dict()


def test_a_folder_of_another_type_gives_that_types_configuration(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    assert isinstance(IRDConfig.from_pretrained(tmp_path), LoraConfig)


def test_every_option_has_a_help_text():
    import dataclasses  # noqa: PLC0415

    own = set(IRDConfig.__annotations__)
    fields = [f for f in dataclasses.fields(IRDConfig) if f.name in own]
    assert fields
    assert all(len(f.metadata.get("help", "")) > 20 for f in fields)
    told = " ".join(IRDConfig.__doc__.split())
    assert all(f"{f.name}: {f.metadata['help']}" in told for f in fields)


def test_a_file_says_of_each_module_all_in_one_line(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.shift = nn.Parameter(torch.zeros(3, 2, 4))

        def forward(self, x):
            return self.scale * x + self.shift

    settings = IRDConfig(density=1.0, method="random")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), Scaled()), settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = r"scale 1 of scalar, shift 24 of 3x2x4; bfloat16 \w{16}, float16 \w{16}"
    assert re.fullmatch(wanted, saved["nnz_pattern"]["1"])
    assert saved["shape_pattern"] is saved["fingerprint"] is None
    loaded = PeftConfig.from_pretrained(tmp_path)
    for field in ("nnz_pattern", "shape_pattern", "fingerprint"):
        assert getattr(loaded, field) == getattr(settings, field) is not None


def as_first_format(folder: Path, model: nn.Module) -> None:
    """Write the file as the first version did: plain indices, one tensor each."""
    path = folder / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "irdelta_coded" not in k}
    for name, layer in model.named_modules():
        if isinstance(layer, IRDLayer):
            for parameter, indices in layer._indices("default").items():
                key = name.replace(".base_layer", "") + ".irdelta_indices." + parameter
                tensors[key] = indices.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    later = ("format_version", "provenance", "fingerprint", "save_dtype")
    kept = {k: v for k, v in settings.items() if k not in later}
    settings = PeftConfig.from_pretrained(folder)  # it had trees, no lines
    kept |= {k: getattr(settings, k) for k in ("nnz_pattern", "shape_pattern")}
    path.write_text(json.dumps(kept))


def test_a_file_of_the_first_format_is_loaded_and_saved_in_the_present_one(
    name, tmp_path
):
    torch.manual_seed(1)
    model = get_peft_model(make_model(name), config(name))
    expected = logits(model, name)
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "old")
    as_first_format(tmp_path / "old", model)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path / "old")
    assert torch.equal(logits(loaded, name), expected)
    loaded.save_pretrained(tmp_path / "again")
    files = [tmp_path / f / "adapter_model.safetensors" for f in ("new", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    native = make_model(name)
    native.load_adapter(str(tmp_path / "old"))
    with pytest.raises(ValueError, match="load that with PEFT and save it again"):
        logits(native, name)


def test_values_are_saved_in_bfloat16_on_request_and_come_back_in_float32(
    name, tmp_path
):
    torch.manual_seed(1)
    model = get_peft_model(make_model(name), config(name, save_dtype="bfloat16"))
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for k, v in file.items() if "values" in k} == {torch.bfloat16}
    values = {n: p for n, p in model.named_parameters() if "irdelta_values" in n}
    assert {p.dtype for p in values.values()} == {torch.float32}
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            make_model(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        found = dict(loaded.named_parameters())
        for key, parameter in values.items():
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key], parameter.bfloat16().float())
    native = make_model(name)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, name), logits(loaded, name))
    kept = [p.dtype for n, p in native.named_parameters() if "irdelta_values" in n]
    assert set(kept) == {torch.float32}


def test_embeddings_saved_whole_have_values_of_the_type_asked_for(tmp_path):
    model = get_peft_model(make_model("llama"), config("llama", save_dtype="bfloat16"))
    state = model.state_dict()
    before = dict(state)
    model.save_pretrained(tmp_path, save_embedding_layers=True, state_dict=state)
    assert all(state[key] is tensor for key, tensor in before.items())
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert any("embed_tokens.base_layer" in key for key in file)
    assert {v.dtype for k, v in file.items() if "values" in k} == {torch.bfloat16}


@pytest.mark.parametrize("is_read", [False, True])
def test_parameters_are_saved_with_their_indices(is_read, name, tmp_path):
    model = get_peft_model(make_model(name), config(name))
    expected = logits(model, name)
    if not is_read:
        model.save_pretrained(tmp_path / "first")
        model = PeftModel.from_pretrained(make_model(name), tmp_path / "first")
    state = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path)
    assert torch.equal(logits(loaded, name), expected)


def test_values_of_modules_without_indices_are_not_saved(tmp_path):
    settings = config("bert", target_modules=["query"])
    model = get_peft_model(make_model("bert"), settings)
    model.add_adapter("second", config("bert"))
    other = get_peft_model(make_model("bert"), config("bert"))
    state = dict(other.named_parameters())
    with pytest.raises(ValueError, match=r"has values for .* but no indices"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.glob("adapter*"))


def test_an_unknown_type_to_save_in():
    with pytest.raises(ValueError, match="`save_dtype` must be one of None, 'float32'"):
        config("bert", save_dtype="int8")


@pytest.mark.parametrize("use_first", [False, True])
def test_loaded_indices_survive_what_is_done_to_models(name, use_first, tmp_path):
    """Before the plain indices are made of the file's, and afterwards."""
    torch.manual_seed(1)
    model = get_peft_model(make_model(name), config(name))
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    native = make_model(name)
    native.load_adapter(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path)
    fresh = get_peft_model(make_model(name), PeftConfig.from_pretrained(tmp_path))
    fresh.load_state_dict(loaded.state_dict(), strict=True)
    for each in (native, loaded, fresh):
        if use_first:
            logits(each, name)
        assert torch.equal(logits(copy.deepcopy(each), name), expected)
        assert torch.equal(logits(pickle.loads(pickle.dumps(each)), name), expected)
        assert torch.equal(logits(each.to(torch.float64).float(), name), expected)
        each.load_state_dict(each.state_dict(), assign=True)
        assert torch.equal(logits(each, name), expected)


def test_an_adapter_saved_again_beside_more_rows_is_sized_by_its_configuration(
    tmp_path,
):
    torch.manual_seed(1)
    model = get_peft_model(make_model("llama"), config("llama", density=0.2))
    model.save_pretrained(tmp_path / "one")
    larger = make_model("llama")
    larger.resize_token_embeddings(1000)
    loaded = PeftModel.from_pretrained(larger, tmp_path / "one")
    expected = logits(loaded, "llama")
    loaded.save_pretrained(tmp_path / "two", save_embedding_layers=False)
    native = make_model("llama")
    native.load_adapter(str(tmp_path / "two"))
    assert torch.equal(logits(native, "llama"), expected[..., :40])


@pytest.mark.filterwarnings("ignore:.*no longer tied:UserWarning")
def test_weights_that_are_assigned_to_a_model_on_meta(name):
    torch.manual_seed(1)
    model = get_peft_model(make_model(name), config(name))
    expected = logits(model, name)
    state = dict(model.state_dict())
    for is_merged in (False, True):
        empty = copy.deepcopy(model).to("meta")
        own = {k: b.clone() for k, b in model.named_buffers() if k not in state}
        empty.load_state_dict(copy.deepcopy(state), assign=True)  # tied tensors, too
        for key, buffer in own.items():  # what a state dict does not have
            if "irdelta" not in key:
                holder, _, last = key.rpartition(".")
                setattr(empty.get_submodule(holder), last, buffer)
        found = empty.merge_and_unload() if is_merged else empty
        torch.testing.assert_close(logits(found, name), expected)


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.filterwarnings("ignore:.*merged:UserWarning")
def test_embeddings_are_saved_as_before_merging(is_copied, tmp_path):
    base = make_model("llama")
    model = get_peft_model(copy.deepcopy(base), config("llama"))
    expected = logits(model, "llama")
    model.merge_adapter()
    state = {k: t.clone() for k, t in model.state_dict().items()} if is_copied else None
    model.save_pretrained(tmp_path, save_embedding_layers=True, state_dict=state)
    torch.testing.assert_close(logits(model, "llama"), expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    whole = [k for k in saved if "irdelta" not in k and saved[k].ndim == 2]
    assert whole
    table = base.get_input_embeddings().weight
    assert all(torch.equal(saved[key], table) for key in whole)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(loaded, "llama"), expected)


class Unusual(nn.Module):
    """A model without output embeddings, that keeps something besides tensors."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)

    def get_output_embeddings(self):
        raise NotImplementedError

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.filterwarnings("ignore:.*merged:UserWarning")
def test_merged_adapters_of_unusual_models_are_saved(tmp_path):
    settings = IRDConfig(density=0.3, method="random", init_weights=False)
    model = get_peft_model(Unusual(), settings)
    model.merge_adapter()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert load_file(tmp_path / "adapter_model.safetensors")


def test_a_model_on_meta_stays_there_whatever_it_is_given():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    settings = IRDConfig(density=0.3, method="random", init_weights=False)
    model = get_peft_model(base, settings)
    empty = copy.deepcopy(model).to("meta")
    with pytest.warns(UserWarning, match="no-op"):
        empty.load_state_dict(model.state_dict())
    assert empty(torch.empty(2, 8, device="meta")).shape == (2, 4)


def test_files_do_not_depend_on_the_default_device(tmp_path):
    model = get_peft_model(make_model("bert"), config("bert"))
    model.save_pretrained(tmp_path / "cpu")
    with torch.device("meta"):
        model.save_pretrained(tmp_path / "other")
    files = [tmp_path / f / "adapter_model.safetensors" for f in ("cpu", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_may_be_called_read(tmp_path):
    model = get_peft_model(make_model("bert"), config("bert"), adapter_name="read")
    expected = logits(model, "bert")
    model.save_pretrained(tmp_path)
    folder = tmp_path / "read"
    loaded = PeftModel.from_pretrained(make_model("bert"), folder, adapter_name="read")
    assert torch.equal(logits(loaded, "bert"), expected)


def test_parameters_come_in_one_order_however_an_adapter_came(name, tmp_path):
    """Optimizers know them by their places."""

    def order(model):
        return [n for n, p in model.named_parameters() if p.requires_grad]

    model = get_peft_model(make_model(name), config(name, density=0.3))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path, is_trainable=True)
    resized = get_peft_model(make_model(name), config(name, density=0.3, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resized.load_adapter(tmp_path, "default", is_trainable=True)
    assert order(loaded) == order(model)
    assert order(resized) == order(model)


def test_resized_embeddings_are_loaded_wherever_adapters_are(tmp_path):
    """They are saved under the names of a model in which another adapter is, too."""

    def base():
        model = make_model("llama-untied")
        torch.manual_seed(3)
        model.resize_token_embeddings(48)
        return model

    model = get_peft_model(base(), config("llama", target_modules=["embed_tokens"]))
    model.add_adapter("other", config("llama", target_modules=["q_proj"]))
    model.set_adapter("other")
    embedding = model.get_input_embeddings()
    embedding.get_base_layer().weight.data += 1
    expected = logits(model, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        loaded = PeftModel.from_pretrained(base(), tmp_path / "other")
    assert torch.equal(logits(loaded, "llama"), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_values_have_the_type_of_the_weights_without_autocast(
    low_cpu_mem_usage, tmp_path
):
    get_peft_model(make_model("bert"), config("bert")).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_model("bert").bfloat16(),
        tmp_path,
        low_cpu_mem_usage=low_cpu_mem_usage,
        autocast_adapter_dtype=False,
    )
    values = [p for n, p in loaded.named_parameters() if "irdelta_values" in n]
    assert {p.dtype for p in values} == {torch.bfloat16}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_keeps_the_precision_of_values(low_cpu_mem_usage, tmp_path):
    model = get_peft_model(make_model("bert").bfloat16(), config("bert"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_model("bert").bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    found = dict(loaded.named_parameters())
    values = {n: p for n, p in model.named_parameters() if "irdelta_values" in n}
    assert {p.dtype for p in values.values()} == {torch.float32}
    for key, parameter in values.items():
        assert torch.equal(found[key], parameter)


def test_an_adapter_that_was_first_used_in_inference_mode_can_be_trained(tmp_path):
    get_peft_model(make_model("gpt2"), config("gpt2")).save_pretrained(tmp_path)
    model = make_model("gpt2")
    model.load_adapter(str(tmp_path))
    with torch.inference_mode():
        model(**make_batch("gpt2"))
    model.enable_adapters()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("irdelta_values" in key)
    model(**make_batch("gpt2")).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "irdelta_values" in n]
    assert all(grad is not None for grad in grads)


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_the_card_says_what_to_import(adapter_name, tmp_path):
    model = get_peft_model(make_model("bert"), config("bert"), adapter_name)
    model.save_pretrained(tmp_path)
    assert "import peft_ird" in (tmp_path / "README.md").read_text("utf-8")


def test_the_card_of_another_adapter_is_left_alone(tmp_path):
    lora = LoraConfig(target_modules=["query"])
    get_peft_model(make_model("bert"), lora).save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text("utf-8")
    model = get_peft_model(make_model("bert"), config("bert"))
    model.save_pretrained(tmp_path / "default")
    model.peft_config["default"].save_pretrained(tmp_path / "alone")
    assert (tmp_path / "README.md").read_text("utf-8") == before
    assert "import peft_ird" in (tmp_path / "default" / "README.md").read_text("utf-8")


def test_indices_take_the_type_that_the_weight_at_hand_needs(tmp_path, monkeypatch):
    """A table may have grown past 2^31 entries since the file was written."""
    model = get_peft_model(make_model("bert"), config("bert", density=0.3))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(holding, "index_dtype", lambda _: torch.int64)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path)
    layers = [m for m in loaded.modules() if isinstance(m, IRDLayer)]
    found = {at.dtype for m in layers for at in m._indices("default").values()}
    assert found == {torch.int64}
