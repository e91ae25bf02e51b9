"""What bad input gets: a clear error before anything changes."""

import copy
import json
import math
import re
import shutil

import datasets
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ReformerConfig, ReformerModelWithLMHead

from peft_ird import Calibration, IRDConfig, select_parameters
from peft_ird.adapter import settling
from tests import oracles
from tests.conftest import make_model, make_samples


def config(**options):
    options.setdefault("num_samples", 8)
    return IRDConfig(task_type="SEQ_CLS", **options)


def refused(message, model, config, calibration=None):
    """Both doors refuse, and leave the model as it was."""
    state = copy.deepcopy(model.state_dict())
    names = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        select_parameters(model, config, calibration)
    config = copy.deepcopy(config)
    if calibration is not None:
        config.calibration = Calibration.of(calibration)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert [type(m) for m in model.modules()] == names
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert config.nnz_pattern is None
    assert config.selection is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Pass either `density`"),
        ({"density": 0.1, "budget": 5}, "Pass either `density`"),
        ({"density": 0.0}, r"`density` must lie in \(0, 1\], got 0"),
        ({"density": 1.1}, r"`density` must lie in \(0, 1\], got 1\.1"),
        ({"density": -0.1}, r"`density` must lie in \(0, 1\]"),
        ({"density": float("nan")}, r"`density` must lie in \(0, 1\]"),
        ({"budget": 0}, "`budget` must be a whole number of at least 1, got 0"),
        ({"budget": 2.5}, "`budget` must be a whole number"),
        ({"density": 0.1, "num_samples": 0}, "`num_samples` must be"),
        ({"density": 0.1, "initial_density": 0.0}, "`initial_density` must lie in"),
        ({"density": 0.1, "method": "lottery"}, "`method` must be one of 'ird'"),
        ({"density": 0.1, "scope": "layer"}, "`scope` must be one of"),
        ({"density": 0.1, "fisher": "true"}, "`fisher` must be one of"),
        ({"density": 0.1, "sample_score": "none"}, "`sample_score` must be one of"),
        ({"density": 0.1, "schedule": []}, "`schedule` is empty"),
        ({"density": 0.1, "schedule": [(2, 0.1), (4, 0.1)]}, "must not grow"),
        ({"density": 0.1, "schedule": "slow"}, "`schedule` must be"),
        ({"density": 0.1, "schedule": 5}, "`schedule` must be"),
        ({"density": 0.1, "schedule": [4, 2]}, "`schedule` must be"),
        ({"density": "0.1"}, r"`density` must lie in \(0, 1\], got '0.1'"),
        ({"density": True}, r"`density` must lie in \(0, 1\], got True"),
        ({"density": 0.1, "head_warmup_steps": None}, "at least 0, got None"),
        (
            {"density": 0.1, "target_modules": "lin.*", "layers_to_transform": [0]},
            "`layers_to_transform` cannot be used",
        ),
        ({"density": 0.1, "layers_pattern": "h"}, "`layers_to_transform` must also"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        IRDConfig(**options)


@pytest.mark.parametrize("value", ["hot", None, True, math.nan, -1.0])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("temperature", "be 0 or more, and finite"),
        ("trim_samples", r"lie in \[0, 1\)"),
        ("head_warmup_learning_rate", "be above 0"),
    ],
)
def test_what_is_no_number_is_refused_by_name(name, rule, value):
    with pytest.raises(ValueError, match=f"`{name}` must {rule}, got {value!r}"):
        IRDConfig(density=0.1, **{name: value})


def test_a_budget_above_the_candidates():
    model = make_model("bert")
    size = sum(p.numel() for p in model.bert.parameters())
    refused(
        rf"{size + 1} entries are asked for.*has {size}",
        model,
        config(budget=size + 1, method="magnitude"),
    )


def test_a_start_below_the_target():
    data = make_samples("bert")
    refused(
        "must not be below",
        make_model("bert"),
        config(density=0.2, initial_density=0.1),
        data,
    )


def test_a_schedule_that_ends_elsewhere():
    schedule = [(8, 0.5), (4, 0.2)]
    refused(
        "must meet the density asked for",
        make_model("bert"),
        config(density=0.1, schedule=schedule),
        make_samples("bert"),
    )


def test_no_module_matches():
    refused(
        "matches no module|No modules were targeted",
        make_model("bert"),
        config(density=0.1, method="random", target_modules=["nothing_like_it"]),
    )


@pytest.mark.parametrize("method", ["ird", "reverse_ird", "fish", "gradient"])
def test_no_calibration(method):
    refused(
        rf"method='{method}' ranks entries on data.*calibration=Calibration",
        make_model("bert"),
        config(density=0.1, method=method),
    )


@pytest.mark.parametrize(
    "data", [[], {"input_ids": torch.zeros(0, 3, dtype=torch.long)}]
)
def test_an_empty_calibration_set(data):
    refused("`calibration` is empty", make_model("bert"), config(density=0.1), data)


def test_more_samples_than_there_are():
    refused(
        r"20 samples are asked for, but `calibration` has 12\. Lower `num_samples`",
        make_model("bert"),
        config(density=0.1, num_samples=20),
        make_samples("bert"),
    )
    refused(
        r"128 samples are asked for, but `calibration` has 12\. Change `schedule`",
        make_model("bert"),
        config(density=0.001, schedule="paper"),
        make_samples("bert"),
    )


def test_missing_labels():
    data = make_samples("bert", 8)
    del data[2]["labels"]
    refused(
        "sample 2 has no `labels`; its fields are input_ids",
        make_model("bert"),
        config(density=0.1),
        data,
    )


@pytest.mark.parametrize("label", [2, -1, -7])
def test_labels_out_of_range(label):
    data = make_samples("bert", 8)
    data[3]["labels"] = label
    refused(
        rf"labels of calibration sample 3 must lie in \[0, 2\).*got {label}",
        make_model("bert"),
        config(density=0.1),
        data,
    )


def test_token_labels_out_of_range():
    model = make_model("llama")
    data = make_samples("llama", 8)
    data[1]["labels"][2] = 40
    settings = IRDConfig(task_type="CAUSAL_LM", density=0.1, num_samples=8)
    refused(r"sample 1 must lie in \[0, 40\).*got 40", model, settings, data)


def test_labels_that_are_all_ignored():
    data = make_samples("llama", 8)
    for sample in data:
        sample["labels"] = [-100] * len(sample["labels"])
    settings = IRDConfig(task_type="CAUSAL_LM", density=0.1, num_samples=8)
    message = "None of the 8 calibration samples has a label that counts"
    refused(message, make_model("llama"), settings, data)


def test_a_model_without_a_backward_pass_in_eval_mode():
    settings = ReformerConfig(
        vocab_size=40, hidden_size=16, attention_head_size=8, num_attention_heads=2,
        feed_forward_size=24, attn_layers=["local"], axial_pos_embds=False,
        max_position_embeddings=32, local_attn_chunk_length=3, is_decoder=True,
    )  # fmt: skip
    data = make_samples("gpt2", 8)
    message = "training mode.* taken in eval mode.* Choose a method that needs none"
    refused(message, ReformerModelWithLMHead(settings), IRDConfig(density=0.1), data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(value):
    def loss(model, batch):
        value_here = value if batch["input_ids"].shape[1] == 5 else 1.0
        return model(**batch).loss * value_here

    data = make_samples("bert", 8)
    refused(
        "loss of calibration sample [16] must be one finite number",
        make_model("bert"),
        config(density=0.1),
        Calibration(data, loss=loss),
    )


def test_a_gradient_that_is_not_finite_is_named():
    def loss(model, batch):
        return model(**batch).logits.sum().mul(0).sqrt()

    refused(
        r"gradient of 'bert.* is not finite on calibration sample \d",
        make_model("bert"),
        config(density=0.1),
        Calibration(make_samples("bert", 8), loss=loss),
    )


def test_a_model_without_a_loss():
    model = nn.Sequential(nn.Linear(3, 2))
    refused(
        "returned no loss.*Calibration\\(..., loss=...\\)",
        model,
        IRDConfig(density=0.1, num_samples=2),
        [torch.randn(3), torch.randn(3)],
    )


def test_a_parameter_without_gradient():
    model = make_model("bert")
    model.bert.spare = nn.Linear(3, 3)
    refused(
        r"no gradient from any sample: bert\.spare\.weight, bert\.spare\.bias",
        model,
        config(density=0.1),
        make_samples("bert"),
    )


@pytest.mark.parametrize("memory_limit", [None, 40_000])
def test_a_parameter_without_gradient_beside_others(memory_limit, caplog):
    """A mask token, say: its module cannot be left out."""
    model = make_model("bert")
    dense = model.bert.encoder.layer[0].output.dense
    dense.spare = nn.Parameter(torch.ones(5))
    options = {"density": 0.9, "exclude_modules": "classifier"}
    found = [
        select_parameters(each, config(**options), data, memory_limit=memory_limit)
        for each in (model, make_model("bert"))
        for data in [Calibration(make_samples("bert"))]
    ]
    name = "bert.encoder.layer.0.output.dense"
    messages = [r.getMessage() for r in caplog.records if "no gradient" in r.message]
    assert len(messages) == 1
    assert messages[0].endswith(f"their entries come last: {name}.spare.")
    assert found[0].num_candidates == found[1].num_candidates + 5
    assert "spare" not in found[0].indices[name]


@pytest.mark.parametrize("method", ["ird", "random"])
def test_an_empty_parameter_is_no_candidate(method):
    class Empty(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.none = nn.Parameter(torch.ones(0, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.none.sum()

    data = Calibration(
        list(torch.randn(6, 4)), loss=lambda model, x: model(x).square().sum(1)
    )
    model = nn.Sequential(Empty())
    selection = select_parameters(model, IRDConfig(density=0.5, method=method), data)
    assert selection.num_candidates == 10
    assert set(selection.indices["0"]) <= {"weight", "bias"}


def test_a_parameter_without_gradient_for_the_gradient_criterion():
    model = make_model("bert")
    model.bert.spare = nn.Linear(3, 3)
    settings = config(density=0.1, method="gradient")
    refused("no gradient from any sample", model, settings, make_samples("bert"))


def test_weights_that_are_not_finite_cannot_be_ranked():
    model = make_model("llama")
    settings = IRDConfig(task_type="CAUSAL_LM", density=0.1, method="magnitude")
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(
        ValueError, match=r"'model\.norm\.weight' has weights that are not"
    ):
        select_parameters(model, settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "`calibration` is empty"),
        ({"input_ids": [[1], [2]], "labels": [0]}, "must have one row per sample"),
        (
            {"train": datasets.Dataset.from_list([{"input_ids": [1], "labels": 0}])},
            "has several splits, train; give one",
        ),
    ],
)
def test_data_of_another_form(data, message):
    refused(message, make_model("bert"), config(density=0.1), data)


def test_a_loss_that_is_no_tensor():
    loss = Calibration(make_samples("bert", 8), loss=lambda *_: 1.0)
    message = r"does not depend on any of the \d+ targeted parameters, from 'bert"
    refused(message, make_model("bert"), config(density=0.1), loss)


def test_sampled_labels_with_a_loss_of_ones_own():
    def loss(model, batch):
        return model(batch).square().mean()

    refused(
        "fisher='sampled' draws labels",
        nn.Sequential(nn.Linear(3, 2)),
        IRDConfig(density=0.1, num_samples=2, fisher="sampled"),
        Calibration([torch.randn(3), torch.randn(3)], loss=loss),
    )


class Int8Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.zeros(4, 4, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype)


class PackedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 4, dtype=torch.int32))

    def forward(self, x):
        return x


@pytest.mark.parametrize("module", [Int8Linear, PackedLinear])
def test_a_quantised_base(module):
    model = nn.Sequential(nn.Linear(4, 4), module())
    settings = IRDConfig(density=0.5, method="random", target_modules=["0", "1"])
    refused("'1' is quantised", model, settings)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    options = {"density": 0.02, "method": "random", "init_weights": False}
    model = get_peft_model(make_model("bert"), config(**options))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused_to_load(folder, message, model=None):
    model = model or make_model("bert")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_base_in_integers_of_the_same_shape(saved):
    model = make_model("bert")
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    message = "'bert.encoder.layer.1.output.dense' is quantised .* torch.int8"
    refused_to_load(saved, message, model)


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def recode(saved, change):
    """Write other indices into the file, whatever they are worth."""
    settings = PeftConfig.from_pretrained(saved)
    module = next(m for m, c in settings.nnz_pattern.items() if max(c.values()) > 1)
    counts, shapes = settings.nnz_pattern[module], settings.shape_pattern[module]
    numels = {name: math.prod(shape) for name, shape in shapes.items()}

    def write(tensors):
        key = f"base_model.model.{module}.irdelta_coded"
        coded = bytes(tensors[key].tolist())
        found = oracles.decoded_module(coded, numels, counts)
        change(max(found.values(), key=len), numels)
        parts = [
            numels[n].to_bytes(8, "little") + oracles.coded_indices(found[n], numels[n])
            for n in sorted(found)
        ]
        tensors[key] = torch.tensor(list(b"".join(parts)), dtype=torch.uint8)

    change_weights(saved, write)


def key_of(tensors, kind, least=2):
    return next(k for k, v in tensors.items() if kind in k and v.numel() >= least)


def test_an_index_that_exceeds_the_weight(saved):
    def change(indices, numels):
        numels.update(dict.fromkeys(numels, 50000))
        indices[-1] = 49_999

    recode(saved, change)
    refused_to_load(saved, r"must lie in \[0, \d+\), got \d+ to 49999")


def test_a_repeated_index(saved):
    def change(indices, _):
        indices[1] = indices[0]

    recode(saved, change)
    refused_to_load(saved, "cannot be decoded.*sorted and distinct")


def test_counts_that_disagree_inside_the_file(saved):
    def change(tensors):
        key = key_of(tensors, "values")
        tensors[key] = tensors[key][:-1].clone()

    change_weights(saved, change)
    refused_to_load(saved, "counts of .* disagree")


def test_counts_that_disagree_with_the_configuration(saved):
    path = saved / "adapter_config.json"
    settings = json.loads(path.read_text())
    module, line = next(iter(settings["nnz_pattern"].items()))
    name, count, rest = line.split(" ", 2)
    settings["nnz_pattern"][module] = f"{name} {int(count) + 1} {rest}"
    path.write_text(json.dumps(settings))
    refused_to_load(saved, re.escape(module) + ".*disagree: adapter_config.json")


def test_a_line_of_the_configuration_that_cannot_be_read(saved):
    path = saved / "adapter_config.json"
    settings = json.loads(path.read_text())
    module, line = next(iter(settings["nnz_pattern"].items()))
    for damaged in ("", line[:8], line.replace(" of ", " "), line + ", ", 3):
        settings["nnz_pattern"][module] = damaged
        path.write_text(json.dumps(settings))
        refused_to_load(saved, re.escape(f"`nnz_pattern` says of '{module}'"))


def test_entries_that_are_missing(saved):
    def change(tensors):
        del tensors[key_of(tensors, "coded")]

    change_weights(saved, change)
    refused_to_load(saved, "missing from the adapter")


def test_a_truncated_file(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused_to_load(saved, "cannot be read as a safetensors file.*cut short")


def test_a_base_model_of_other_shapes(saved):
    from transformers import BertForSequenceClassification  # noqa: PLC0415

    from tests.conftest import bert_config  # noqa: PLC0415

    settings = bert_config()
    settings.hidden_size = 32
    refused_to_load(
        saved, "made for another base model", BertForSequenceClassification(settings)
    )


def test_a_base_model_without_these_modules(saved):
    refused_to_load(saved, "has no parameter 'bert", make_model("llama"))


def test_bad_tensors_given_directly_change_nothing(saved):
    from peft import set_peft_model_state_dict  # noqa: PLC0415

    model = PeftModel.from_pretrained(make_model("bert"), saved)
    before = copy.deepcopy(model.state_dict())
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors[key_of(tensors, "coded")][:] = 0
    with pytest.raises(ValueError, match="cannot be decoded"):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_configuration_without_its_weights(saved, tmp_path):
    shutil.copy(saved / "adapter_config.json", tmp_path)
    model = get_peft_model(make_model("bert"), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="weights were never loaded"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_a_selection_of_another_size_than_asked_for():
    selection = select_parameters(make_model("bert"), config(budget=9, method="random"))
    with pytest.raises(ValueError, match=r"has 9 entries, but .* asks for 8"):
        get_peft_model(make_model("bert"), config(budget=8, selection=selection))


def test_a_selection_for_another_model():
    selection = select_parameters(make_model("bert"), config(budget=9, method="random"))
    with pytest.raises(ValueError, match="has no parameter"):
        get_peft_model(make_model("llama"), IRDConfig(selection=selection))


def test_a_configuration_that_is_refused_late_stays_as_it_was(monkeypatch):
    settings = IRDConfig(density=0.1, method="magnitude", target_modules=["query"])
    model = make_model("bert")
    settings.selection = select_parameters(
        model, IRDConfig(density=0.1, method="random", target_modules=["query"])
    )

    def refuse(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(settling, "check_tied_heads", refuse)
    before = settings.to_dict()
    with pytest.raises(ValueError, match="no"):
        get_peft_model(model, settings)
    assert settings.to_dict() == before


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = make_model("gpt2")
    with pytest.raises(
        ValueError, match=r"wte\.weight' is offloaded or was never loaded"
    ):
        select_parameters(model, IRDConfig(density=0.1), make_samples("gpt2"))
