"""Batches in which every sample has an adapter of its own."""

import copy
import threading
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError  # noqa: A004

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    MPNetConfig,
    MPNetForMaskedLM,
)

from peft_ird import IRDConfig
from peft_ird.layers.mixed_batch import handed_out
from peft_ird.sparse.lending import with_delta
from tests.conftest import make_batch, make_model, task_type
from tests.oracles import TOL

NAMES = ["two", "__base__", "one"]


def with_two(name: str, **options) -> PeftModel:
    """Two adapters with other entries and, for a classifier, other heads."""
    torch.manual_seed(0)
    options = {"method": "random", "density": 0.3, "init_weights": False, **options}
    options["task_type"] = task_type(name)
    model = make_model(name).double()
    model = get_peft_model(model, IRDConfig(**options), "one")
    model.add_adapter("two", IRDConfig(seed=1, **options))
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            parameter.data.normal_()
    return model.eval()


def one_by_one(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """Run each sample alone with its adapter active."""
    found = []
    for i, name in enumerate(NAMES):
        sample = {key: tensor[i : i + 1] for key, tensor in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                found.append(model(**sample).logits)
        else:
            model.set_adapter(name)
            found.append(model(**sample).logits)
    return torch.cat(found)


@pytest.mark.parametrize("target", [None, "all-linear"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "llama-classifier", "t5"])
def test_each_sample_gets_its_own_adapter(kind, target):
    # Relative positions in T5 are embedded for all samples at once.
    excluded = {"exclude_modules": ["relative_attention_bias"]} if kind == "t5" else {}
    model, batch = with_two(kind, target_modules=target, **excluded), make_batch(kind)
    with torch.no_grad():
        expected = one_by_one(model, batch)
        found = model(**batch, adapter_names=NAMES).logits
        assert_close(found, expected, **TOL[torch.float64])
        model.set_adapter("one")
        assert not torch.allclose(model(**batch).logits, expected)


SIZES = {"vocab_size": 40, "max_position_embeddings": 32}
TABLES = {
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, **SIZES)
    ),
    "mpnet": lambda: MPNetForMaskedLM(
        MPNetConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **SIZES)
    ),
    "t5": lambda: make_model("t5"),
}


@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_with_as_many_rows_as_samples_are_refused(kind, length):
    """Positions of three tokens, or distances between them, are no three samples."""
    torch.manual_seed(0)
    options = {"method": "random", "density": 0.3, "init_weights": False}
    model = get_peft_model(TABLES[kind](), IRDConfig(**options), "one").eval()
    model.add_adapter("two", IRDConfig(seed=1, **options))
    three, others = torch.randint(3, 40, (3, 3)), torch.randint(3, 40, (3, length))
    batch = {"input_ids": three}
    if kind != "mpnet":
        batch = {"input_ids": others, "decoder_input_ids": three}
    message = "rows are samples or tokens|the same as the number of inputs"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**batch, adapter_names=NAMES)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_there_may_be_as_many_tokens_as_samples(kind):
    model = with_two(kind)
    batch = {"input_ids": torch.randint(3, 40, (3, 3))}
    with torch.no_grad():
        expected = one_by_one(model, batch)
        found = model(**batch, adapter_names=NAMES).logits
    assert_close(found, expected, **TOL[torch.float64])


class Table(nn.Module):
    """Makes as many rows as one likes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, rows: int | None, **_: object) -> Tensor:
        table = self.weight.sum() if rows is None else self.weight.expand(rows, 4)
        return table + x.mean()


@pytest.mark.parametrize(
    ("rows", "other", "message"),
    [
        (2, None, "the same as the number of inputs, but got 1 and 2"),
        (1, DynamicCache(), "A DynamicCache cannot be split by sample"),
        (None, None, "A single number is of no sample"),
    ],
)
def test_what_cannot_be_split_by_sample_is_refused(rows, other, message):
    options = {"method": "random", "density": 1.0, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(Table()), IRDConfig(**options), "one").eval()
    layer = model.base_model.model[0]
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 4), rows, other=other, adapter_names=["one", "__base__"])
    assert len(layer(torch.zeros(2, 4), 1, adapter_names=["one", "__base__"])) == 2
    with pytest.raises(ValueError, match="one row for all 2 samples"):
        layer(torch.zeros(1, 4), 1, adapter_names=["one", "__base__"])


def test_other_outputs_must_be_the_same_for_all_samples():
    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return super().forward(x), len(x)

    options = {"method": "random", "density": 1.0, "target_modules": ["0"]}
    base = nn.Sequential(Counting(4, 4))
    model = get_peft_model(base, IRDConfig(**options), "one").eval()
    layer, x = model.base_model.model[0], torch.zeros(3, 4)
    with pytest.raises(ValueError, match="returns 2 for some samples"):
        layer(x, adapter_names=["one", "one", "__base__"])
    assert layer(x, adapter_names=["one"] * 3)[1] == 3


def test_a_parameter_that_others_read_is_not_that_of_the_active_adapter():
    """Attention reads its output projection; the type of a weight may be asked for."""
    options = {"method": "random", "density": 1.0, "init_weights": False}
    options["target_modules"] = ["out_proj"]
    model = get_peft_model(Attentive(), IRDConfig(**options), "one").eval()
    model.add_adapter("two", IRDConfig(seed=1, **options))
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        model.set_adapter("two")
        expected = model(x)
        model.set_adapter("one")
        found = model(x, adapter_names=["two"] * 3)
        with pytest.raises(ValueError, match="another module computes with"):
            model(x, adapter_names=NAMES)
    assert torch.equal(found, expected)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.attention.out_proj.weight
        x = x.to(weight.device, weight.dtype)
        assert weight.shape == (4, 4)
        return self.attention(x, x, x)[0]


def test_a_batch_of_one_adapter_need_not_have_it_active():
    model, batch = with_two("gpt2"), make_batch("gpt2")
    with torch.no_grad():
        model.set_adapter("one")
        expected = model(**batch).logits
        model.set_adapter("two")
        found = model(**batch, adapter_names=["one"] * 3).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_mixes_adapters(kind, num_beams):
    excluded = {"exclude_modules": ["relative_attention_bias"]} if kind == "t5" else {}
    model = with_two(kind, **excluded)
    ids = make_batch(kind)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams}
    found = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    for row, name, sample in zip(found, NAMES, ids, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=sample[None], **options)[0]
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=sample[None], **options)[0]
        assert row[: len(alone)].tolist() == alone.tolist()
        assert set(row[len(alone) :].tolist()) <= {model.config.pad_token_id}


@pytest.mark.parametrize("names", [["one", "two"], ["one", "two", "two", "one"]])
def test_the_position_of_one_token_is_no_row_of_a_sample(names):
    """BART's decoder hands on positions without a dimension of samples."""
    torch.manual_seed(0)
    options = {"method": "random", "density": 0.3, "init_weights": False}
    model = get_peft_model(TABLES["bart"]().double(), IRDConfig(**options), "one")
    model.add_adapter("two", IRDConfig(seed=1, **options))
    model.eval()
    ids, last = torch.randint(3, 40, (2, len(names), 1))
    with torch.no_grad():
        expected = []
        for name, row, token in zip(names, ids, last, strict=True):
            model.set_adapter(name)
            alone = {"input_ids": row[None], "decoder_input_ids": token[None]}
            expected.append(model(**alone).logits)
        batch = {"input_ids": ids, "decoder_input_ids": last}
        found = model(**batch, adapter_names=names).logits
    assert_close(found, torch.cat(expected), **TOL[torch.float64])


def test_tuples_and_other_outputs_are_put_together():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, int]]:
            return x * self.weight * scale, {"size": 3}

    torch.manual_seed(0)
    options = {"method": "random", "density": 1.0, "init_weights": False}
    options["target_modules"] = ["0"]
    model = get_peft_model(nn.Sequential(Pair()), IRDConfig(**options), "one").eval()
    layer = model.base_model.model[0]
    x, scale = torch.randn(3, 3), torch.tensor(2.0)
    names = ["one", "__base__", "one"]
    found, others = layer(x, scale=scale, adapter_names=names)
    expected = torch.stack([layer(x, scale)[0][0], 2 * x[1], layer(x, scale)[0][2]])
    assert_close(found, expected)
    assert others == {"size": 3}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "four", "two"], "non-existing adapter.*four"),
        (["one", "two"], "Length of `adapter_names` should be the same.*2 and 3"),
        (["one"] * 5, "Length of `adapter_names` should be the same.*5 and 3"),
    ],
)
def test_names_that_do_not_fit_are_refused_as_in_lora(names, message):
    batch = make_batch("bert")
    options = {"r": 2, "target_modules": ["query"], "init_lora_weights": False}
    lora = get_peft_model(make_model("bert"), LoraConfig(**options), "one")
    lora.add_adapter("two", LoraConfig(**options))
    for model in (with_two("bert"), lora.eval()):
        with pytest.raises(ValueError, match=message):
            model(**batch, adapter_names=names)


@pytest.mark.parametrize("names", [[], ["one"], ["one", "one"], ["one"] * 6])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_names_must_be_one_for_each_sample(kind, names):
    model, batch = with_two(kind), make_batch(kind)
    message = f"number of inputs, but got {len(names)} and 3"
    with pytest.raises(ValueError, match=message):
        model(**batch, adapter_names=names)
    if kind == "gpt2":
        with pytest.raises(ValueError, match=message):
            model.generate(
                input_ids=batch["input_ids"], adapter_names=names, max_new_tokens=2
            )


def test_no_hook_is_left_behind_by_an_error():
    model, batch = with_two("bert"), make_batch("bert")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**batch, adapter_names=["one", "two"])
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_training_and_merged_models_are_refused(kind):
    model, batch = with_two(kind), make_batch(kind)
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(**batch, adapter_names=NAMES)
    model.eval().merge_adapter(["two"])
    with pytest.raises(ValueError, match=r"merged adapters.*`unmerge_adapter`"):
        model(**batch, adapter_names=NAMES)


class Outer(nn.Module):
    """A module with a parameter of its own around others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale).tanh()


@pytest.mark.parametrize(
    "names", [NAMES, ["two", "one", "one"], ["one", "three", "two"]]
)
def test_modules_inside_of_wrapped_ones_see_their_samples_only(names):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), Outer()).double()
    options = {"method": "random", "density": 0.7, "init_weights": False}
    targets = {"one": ["0", "1", "inner"], "two": ["inner"], "three": ["1"]}
    model = get_peft_model(base, IRDConfig(target_modules=["1"], **options), "three")
    for seed, name in enumerate(("one", "two")):
        settings = IRDConfig(target_modules=targets[name], seed=seed, **options)
        model.add_adapter(name, settings)
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model(row[None]))
        else:
            model.set_adapter(name)
            expected.append(model(row[None]))
    given = list(names)
    found = model.eval()(x, adapter_names=given)
    assert_close(found, torch.cat(expected), **TOL[torch.float64])
    assert given == list(names)


def test_disabled_adapters_stay_off():
    model, batch = with_two("gpt2"), make_batch("gpt2")
    expected = copy.deepcopy(model).unload()(**batch).logits
    assert not torch.equal(model(**batch, adapter_names=NAMES).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch, adapter_names=NAMES).logits, expected)


def test_threads_have_adapters_of_their_own():
    model, batch = with_two("bert"), make_batch("bert")
    names = {"mixed": NAMES, "one": ["one"] * 3, "active": None}
    model.set_adapter("two")
    together = threading.Barrier(len(names))

    def run(wanted: list[str] | None) -> Tensor:
        with torch.no_grad(), handed_out(model.base_model, wanted):
            together.wait(60)  # all are inside
            found = model.base_model.model(**batch).logits
            together.wait(60)  # and none has left
            return found

    expected = {}
    for name, wanted in names.items():
        with torch.no_grad():
            expected[name] = model(**batch, adapter_names=wanted).logits
    with ThreadPoolExecutor(len(names)) as threads:
        work = {name: threads.submit(run, wanted) for name, wanted in names.items()}
    for name, each in work.items():
        assert_close(each.result(), expected[name], **TOL[torch.float64])


@pytest.mark.parametrize("wanted", [["two"] * 3, ["__base__"] * 3, None])
def test_a_delta_in_a_weight_is_not_seen_by_threads_without_it(wanted):
    """Neither by those whose adapter has no entries in that module."""
    torch.manual_seed(0)
    settings = {"method": "random", "density": 0.5, "init_weights": False}
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = (IRDConfig(target_modules=[n], **settings) for n in "01")
    model, x = get_peft_model(base, first, "one"), torch.randn(3, 4)
    model.add_adapter("two", second)
    model.set_adapter("two")
    layer = model.eval().base_model.model[0]
    weight, delta = layer.base_layer.weight, layer._delta("one", "weight")
    options = {} if wanted is None else {"adapter_names": wanted}

    def run() -> Tensor:
        with torch.no_grad():
            return model(x, **options)

    expected = run()
    with ThreadPoolExecutor(1) as threads:

        def look(_: Tensor) -> Future[Tensor]:
            found = threads.submit(run)
            with pytest.raises(TimeoutError):
                found.result(0.2)  # it waits until the delta is out
            return found

        found = with_delta(weight, delta.indices, delta.values, look)
        assert torch.equal(found.result(60), expected)
