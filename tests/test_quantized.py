"""Adapters on linear layers whose weights are there as codes only."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_ird import Calibration, IRDConfig, select_parameters
from peft_ird.adapter.modules import layers_of
from peft_ird.layers.kinds import QuantizedLinear
from peft_ird.sparse.ways import forced
from tests.conftest import llama_config, make_batch, make_model, make_samples, task_type
from tests.oracles import TOL, dense

DATA_METHODS = ["ird", "reverse_ird", "fish", "gradient"]


class Decoded(torch.autograd.Function):
    """``x W^T`` with a weight that no one else sees, as libraries' kernels have it."""

    @staticmethod
    def forward(ctx, x, codes, scales):
        ctx.save_for_backward(codes, scales)
        return F.linear(x, codes.to(x.dtype) * scales.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        codes, scales = ctx.saved_tensors
        return grad @ (codes.to(grad.dtype) * scales.to(grad.dtype)), None, None


def product(x, codes, scales):
    if torch.compiler.is_compiling():  # warns of functions of autograd
        return F.linear(x, codes.to(x.dtype) * scales.to(x.dtype))
    return Decoded.apply(x, codes, scales)


class Int8Linear(nn.Linear):
    """Codes of the weight's shape, as in eight bits of bitsandbytes."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        codes, self.scales = coded(layer.weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        y = product(x, self.weight, self.scales)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def decoded(self):
        return self.weight * self.scales


class PackedLinear(nn.Module):
    """Codes in a buffer of another shape, as in GPTQ; its bias is a buffer, too."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, self.scales = coded(layer.weight)
        self.register_buffer("qweight", codes.view(-1, 2).view(torch.int16))
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x):
        y = product(x, self.codes(), self.scales)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def codes(self):
        shape = self.out_features, self.in_features
        return self.qweight.view(torch.int8).view(shape)

    def decoded(self):
        return self.codes() * self.scales


def coded(weight):
    scales = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scales).round().to(torch.int8), scales


def quantized(name, kind, dtype=torch.float32):
    """Return a model with coded layers, and a plain one with what they decode to."""
    plain = make_model(name).to(dtype)
    model = copy.deepcopy(plain)
    for path, module in [*model.named_modules()]:
        if type(module) is nn.Linear and path.split(".")[-1] not in HEADS:
            parent, _, child = path.rpartition(".")
            layer = kind(module)
            setattr(model.get_submodule(parent), child, layer)
            plain.get_submodule(path).weight.data = layer.decoded().to(dtype)
    return model, plain


HEADS = ("classifier", "lm_head", "score")


@pytest.fixture(params=[Int8Linear, PackedLinear])
def kind(request):
    return request.param


@pytest.fixture(params=["bert", "llama"])
def name(request):
    return request.param


TARGETS = r".*\.(dense|query|value|key|[qkvo]_proj|(up|gate|down)_proj)"


def config(name, **options):
    options = {"density": 0.1, "target_modules": TARGETS, **options}
    return IRDConfig(task_type=task_type(name), init_weights=False, **options)


def adapted(name, kind, dtype=torch.float64):
    """Return a quantised and a plain model with the same adapter."""
    models = quantized(name, kind, dtype)
    selection = select_parameters(models[1], config(name, method="random"))
    found = []
    for model in models:
        torch.manual_seed(0)
        settings = config(name, selection=selection, density=None)
        found.append(get_peft_model(model, settings).to(dtype).eval())
    return found


def values_of(model):
    return {n: p for n, p in model.named_parameters() if "irdelta_values" in n}


@pytest.mark.parametrize("way", [None, "dense"])
def test_outputs_and_gradients_are_those_of_decoded_weights(name, kind, way):
    model, plain = adapted(name, kind)
    batch = make_batch(name)
    kinds = {type(layer) for layer in layers_of(model).values()}
    assert kinds == {QuantizedLinear}
    with forced(way=way):
        output = model(**batch)
    expected = plain(**batch)
    tolerance = TOL[torch.float64]
    assert_close(output.logits, expected.logits, **tolerance)
    output.loss.backward()
    expected.loss.backward()
    wanted = values_of(plain)
    for key, values in values_of(model).items():
        if ".bias" not in key or kind is Int8Linear:
            assert_close(values.grad, wanted[key].grad, **tolerance)
    with model.disable_adapter(), plain.disable_adapter():
        assert_close(model(**batch).logits, plain(**batch).logits, **tolerance)


def test_a_layer_alone_against_the_dense_delta(kind):
    torch.manual_seed(0)
    base = kind(nn.Linear(6, 5).double())
    model = nn.Sequential(base)
    settings = IRDConfig(
        density=0.4, method="random", target_modules=["0"], init_weights=False
    )
    model = get_peft_model(model, settings).double()
    layer = model.base_model.model[0]
    delta = {
        key: dense(indices, layer.irdelta_values.default[key], shape)
        for key, indices, shape in (
            (key, indices, (5, 6) if key == "weight" else (5,))
            for key, indices in layer._indices("default").items()
        )
    }
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = base.decoded() + delta["weight"]
    expected = F.linear(x, weight, base.bias + delta.get("bias", 0))
    seen = []
    base.register_forward_hook(lambda *args: seen.append(args[-1]))
    output = model(x)
    assert_close(output, expected, **TOL[torch.float64])
    assert_close(seen[0], expected, **TOL[torch.float64])
    (grad,) = torch.autograd.grad(output.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    assert_close(grad, wanted, **TOL[torch.float64])


@pytest.mark.parametrize("method", DATA_METHODS)
def test_entries_are_those_of_decoded_weights(name, kind, method):
    model, plain = quantized(name, kind, torch.float64)
    before = {n: (p, copy.deepcopy(p)) for n, p in model.named_parameters()}
    modules = [*model.named_modules()]
    options = {"method": method, "num_samples": 8, "scope": "per_module"}
    if kind is PackedLinear:  # whose biases are no parameters
        plain = without_biases(plain)
    found, expected = (
        select_parameters(each, config(name, **options), calibration(name))
        for each in (model, plain)
    )
    assert found.samples == expected.samples
    assert found.num_candidates == expected.num_candidates
    assert found.shapes == expected.shapes
    for module, named in expected.indices.items():
        for key, indices in named.items():
            assert torch.equal(found.indices[module][key], indices)
    assert [*model.named_modules()] == modules
    for key, parameter in model.named_parameters():
        same, copied = before[key]
        assert parameter is same
        assert torch.equal(parameter, copied)
        assert parameter.grad is None


def without_biases(plain):
    """Make biases of linear layers buffers."""
    for path, module in plain.named_modules():
        if type(module) is nn.Linear and path.split(".")[-1] not in HEADS:
            bias = module.bias
            del module.bias
            module.register_buffer("bias", None if bias is None else bias.detach())
    return plain


def calibration(name):
    samples = make_samples(name)

    def collate(rows):
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row["input_ids"]) for row in rows], batch_first=True
        )
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows],
            batch_first=True,
        )
        if name == "bert":
            labels = torch.tensor([row["labels"] for row in rows])
        else:
            labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return Calibration(samples, collate)


def test_an_error_while_selecting_leaves_the_layers(kind):
    model, _ = quantized("bert", kind)
    modules, biases = [*model.named_modules()], dict(model.named_parameters())

    def broken(_):
        raise RuntimeError("no batch today")

    data = Calibration(make_samples("bert"), broken)
    with pytest.raises(RuntimeError, match="no batch today"):
        select_parameters(model, config("bert"), data)
    assert [*model.named_modules()] == modules
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in biases.items()
    }


def test_a_second_adapter_is_selected_beside_the_first(kind):
    model, plain = adapted("bert", kind, torch.float32)
    found = []
    for each in (model, plain):
        data = calibration("bert")
        options = {"method": "fish", "exclude_modules": ["pooler"], "density": 0.01}
        each.add_adapter("second", config("bert", calibration=data, **options))
        found.append(each.peft_config["second"].nnz_pattern)
    weights = [
        {m: c["weight"] for m, c in counts.items() if "weight" in c} for counts in found
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(isinstance(m, QuantizedLinear) for m in layers_of(model).values())


def test_saved_on_one_base_and_loaded_on_the_other(name, kind, tmp_path):
    model, plain = adapted(name, kind, torch.float32)
    batch = make_batch(name)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "quantised")
    plain.save_pretrained(tmp_path / "plain")
    for source in ("quantised", "plain"):
        for base in quantized(name, kind):
            loaded = PeftModel.from_pretrained(base, tmp_path / source).eval()
            assert_close(loaded(**batch).logits, expected, **TOL[torch.float32])


@pytest.mark.parametrize("mixed", [False, True])
def test_merging_is_refused_before_anything_is_written(kind, mixed):
    model, _ = quantized("bert", kind)
    settings = IRDConfig(
        task_type="SEQ_CLS", density=0.1, method="random", init_weights=False
    )
    model = get_peft_model(model, settings, mixed=mixed)
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'bert\.encoder.*' is quantised"):
            merge()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    base = model.unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules())


def test_magnitudes_are_not_there(kind):
    model, _ = quantized("bert", kind)
    with pytest.raises(ValueError, match=r"is quantised .* unquantised model"):
        get_peft_model(model, config("bert", method="magnitude"))
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def test_what_is_read_of_a_layer(kind):
    model, _ = adapted("bert", kind, torch.float32)
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    base = layer.get_base_layer()
    assert (layer.in_features, layer.out_features) == (24, 16)
    if kind is Int8Linear:
        assert layer.weight is base.weight
    assert layer.get_delta_weight("default").shape == (16, 24)
    assert "QuantizedLinear" in repr(layer)


def test_training_after_preparing_for_few_bits(name, kind):
    model, _ = quantized(name, kind)
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, config(name, method="random"))
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    batch = make_batch(name)
    codes = [copy.deepcopy(b) for b in model.parameters() if not b.is_floating_point()]
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = [b for b in model.parameters() if not b.is_floating_point()]
    assert all(map(torch.equal, codes, after))


def test_copied_and_pickled(kind):
    model, _ = adapted("bert", kind, torch.float32)
    batch = make_batch("bert")
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, expected)


def test_compiled_whole(kind):
    model, _ = adapted("bert", kind, torch.float32)
    batch = make_batch("bert")
    expected = model(**batch).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(**batch).logits, expected, **TOL[torch.float32])


def test_an_adapter_for_each_sample(kind):
    model, plain = adapted("bert", kind, torch.float32)
    batch = make_batch("bert")
    names = ["default", "__base__", "default"]
    found, expected = (each(**batch, adapter_names=names) for each in (model, plain))
    assert_close(found.logits, expected.logits, **TOL[torch.float32])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    """Beside the layers above, what people use, where it is installed."""
    pytest.importorskip("bitsandbytes")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
    }
    large = LlamaConfig(**{**llama_config().to_dict(), **sizes})
    LlamaForCausalLM(large).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def base():
        folder = tmp_path / "base"
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=settings)

    options = {"target_modules": "all-linear", "init_weights": False, "density": 0.1}
    data = calibration("llama")
    model = get_peft_model(
        base(),
        IRDConfig(task_type="CAUSAL_LM", **options, calibration=data, num_samples=8),
    )
    assert {*map(type, layers_of(model).values())} == {QuantizedLinear}
    batch = make_batch("llama")
    model(**batch).loss.backward()
    assert all(values.grad.any() for values in values_of(model).values())
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert_close(loaded(**batch).logits, expected, rtol=2e-2, atol=2e-2)
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, expected, rtol=2e-2, atol=2e-2)
