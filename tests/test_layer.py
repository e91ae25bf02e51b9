"""Every layer kind against the dense computation, in float64."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.testing import assert_close
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from peft_ird import IRDConfig
from peft_ird.adapter.modules import layers_of
from peft_ird.layers.kinds import wrap
from peft_ird.layers.layer import IRDLayer
from peft_ird.sparse import ways
from tests import oracles
from tests.oracles import TOL


class Scale(nn.Module):
    """A custom module that is not affine in its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4))
        self.b = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return (x * self.a).tanh() * self.b.exp()


class Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *args):
        return self.inner(*args)


def floats(*shape):
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


def tokens():
    return (torch.tensor([[0, 2, 2], [6, 0, 1]]),)


KINDS = {
    "Linear": (lambda: nn.Linear(4, 3), floats(2, 5, 4)),
    "Linear without bias": (lambda: nn.Linear(4, 3, bias=False), floats(5, 4)),
    "Conv1D": (lambda: Conv1D(3, 4), floats(2, 5, 4)),
    "Embedding": (lambda: nn.Embedding(7, 4), tokens),
    "Embedding with padding": (lambda: nn.Embedding(7, 4, padding_idx=0), tokens),
    "LayerNorm": (lambda: nn.LayerNorm(4), floats(2, 5, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), floats(2, 5, 4)),
    "LlamaRMSNorm": (lambda: LlamaRMSNorm(4), floats(2, 5, 4)),
    "T5LayerNorm": (lambda: T5LayerNorm(4), floats(2, 5, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), floats(2, 4, 3)),
    "GemmaRMSNorm": (lambda: GemmaRMSNorm(4), floats(2, 5, 4)),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3, groups=2), floats(2, 2, 6)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 2, stride=2), floats(2, 2, 4, 4)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), floats(1, 1, 3, 3, 3)),
    "Bilinear": (
        lambda: nn.Bilinear(2, 3, 2),
        lambda: (*floats(4, 2)(), *floats(4, 3)()),
    ),
    "GRU": (lambda: nn.GRU(3, 2), floats(4, 1, 3)),
    "custom": (Scale, floats(3, 4)),
}
AFFINE = [kind for kind in KINDS if "Norm" in kind or "Linear" in kind]
AFFINE += ["Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"]
ALL = -1


def adapted(kind: str, k: int, dtype: torch.dtype = torch.float64, **options):
    """A wrapped module of this kind with k random entries, its copy and its input."""
    torch.manual_seed(0)
    make, inputs = KINDS[kind]
    model = Holder(make().to(dtype)).eval()
    size = sum(p.numel() for p in model.parameters())
    base = copy.deepcopy(model.inner)
    config = IRDConfig(budget=size if k == ALL else k, method="random", **options)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in inputs())
    return peft_model, base, args


def dense_deltas(layer: IRDLayer) -> dict[str, torch.Tensor]:
    base = layer.get_base_layer()
    return {
        name: oracles.dense(
            layer.irdelta_indices["default"][name],
            values,
            base.get_parameter(name).shape,
        )
        for name, values in layer.irdelta_values["default"].items()
    }


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("k", [1, 3, ALL])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_the_dense_computation(kind, k):
    model, base, args = adapted(kind, k, init_weights=False)
    layer = model.base_model.model.inner
    oracle = oracles.with_dense_deltas(base, dense_deltas(layer))
    x = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    y = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    output, expected = first(layer(*x)), first(oracle(*y))
    assert_close(output, expected, **TOL[torch.float64])
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    for name, values in layer.irdelta_values["default"].items():
        dense_gradient = oracle.get_parameter(name).grad.flatten()
        at = dense_gradient[layer.irdelta_indices["default"][name]]
        assert_close(values.grad, at, **TOL[torch.float64])
    for mine, theirs in zip(x, y, strict=True):
        if theirs.grad is not None:
            assert_close(mine.grad, theirs.grad, **TOL[torch.float64])


# By definition the padding row gets no gradient, so differences disagree there; Gemma's
# norm computes in float32.
@pytest.mark.parametrize(
    "kind", [k for k in KINDS if "padding" not in k and "Gemma" not in k]
)
def test_the_values_pass_gradcheck(kind):
    model, _, args = adapted(kind, 3, init_weights=False)
    layer = model.base_model.model.inner
    names = [n for n, _ in layer.named_parameters() if "irdelta_values" in n]
    values = [layer.get_parameter(name).detach().requires_grad_() for name in names]

    def call(*values):
        given = dict(zip(names, values, strict=True))
        return first(torch.func.functional_call(layer, given, args))

    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_values_give_the_base_output_bit_for_bit(kind):
    model, base, args = adapted(kind, ALL, torch.float32)
    assert torch.equal(first(model(*args)), first(base(*args)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_puts_every_bit_back(kind, dtype):
    model, base, _ = adapted(kind, ALL, dtype, init_weights=False)
    model.merge_adapter()
    layer = model.base_model.model.inner
    changed = [
        not torch.equal(p, q)
        for p, q in zip(
            layer.get_base_layer().parameters(), base.parameters(), strict=True
        )
    ]
    assert any(changed)
    model.unmerge_adapter()
    for p, q in zip(
        layer.get_base_layer().parameters(), base.parameters(), strict=True
    ):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_active_outputs_are_bit_identical_in_float32(kind):
    model, _, args = adapted(kind, ALL, torch.float32, init_weights=False)
    active = first(model(*args))
    model.merge_adapter()
    assert torch.equal(first(model(*args)), active)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", AFFINE)
def test_a_small_delta_survives_in_low_precision(kind, dtype):
    model, base, args = adapted(kind, ALL, torch.float64)
    layer = model.base_model.model.inner
    for values in layer.irdelta_values["default"].values():
        values.data.fill_(1e-4)
    exact = first(model(*args)) - first(base(*args))
    model.to(dtype)
    for name, values in layer.irdelta_values["default"].items():
        layer.irdelta_values["default"][name] = nn.Parameter(values.float())
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    base_output = torch.zeros_like(first(base.to(dtype)(*args)))
    layer.base_layer.forward = lambda *_: base_output
    share = first(layer._run(layer._deltas_in_force(), *args))
    assert share.dtype == dtype
    assert_close(share.double(), exact, rtol=0.05, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_module_without_entries_is_the_base(kind):
    model, base, args = adapted(kind, ALL, init_weights=False)
    layer = model.base_model.model.inner
    assert not torch.equal(first(layer(*args)), first(base(*args)))
    layer.drop_entries("default")
    assert torch.equal(first(layer(*args)), first(base(*args)))
    assert not first(layer(*args)).requires_grad


class Scaled(nn.Linear):
    """A subclass that computes something else than its base class."""

    def forward(self, x):
        return super().forward(x).tanh() * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base(dtype):
    torch.manual_seed(0)
    settings = IRDConfig(density=1.0, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(Scaled(3, 3).to(dtype)), settings)
    x = torch.randn(4, 3, dtype=dtype)
    active = model(x)
    model.merge_adapter()
    assert_close(active, model(x), **TOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_was_put_on_the_instance_gets_the_delta(dtype):
    """As accelerate does when it dispatches a model."""
    torch.manual_seed(0)
    settings = IRDConfig(density=1.0, method="random", init_weights=False)
    base = nn.Sequential(nn.Linear(3, 3), Scaled(3, 3)).to(dtype)
    model = get_peft_model(copy.deepcopy(base), settings)
    x = torch.randn(4, 3, dtype=dtype)
    expected = model(x)
    for layer in model.base_model.model:
        add_hook_to_module(layer.base_layer, AlignDevicesHook(io_same_device=True))
    found = model(x)
    assert_close(found, expected, **TOL[dtype])
    assert found.requires_grad
    for layer, plain in zip(model.base_model.model, base, strict=True):
        assert torch.equal(layer.base_layer.weight, plain.weight)
        assert isinstance(layer.base_layer.weight, nn.Parameter)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_a_transformer_layer_of_torch_works_in_both_modes():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    settings = IRDConfig(density=1.0, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(encoder), settings)
    x = torch.randn(2, 3, 4)
    trained = model.train()(x)
    with torch.no_grad():
        evaluated = model.eval()(x)
    merged = model.merge_and_unload().eval()
    assert_close(trained, merged(x), **TOL[torch.float32])
    assert_close(evaluated, merged(x), **TOL[torch.float32])


def test_a_module_without_entries_is_not_wrapped():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(model, IRDConfig(budget=1, method="magnitude"))
    wrapped = [isinstance(m, IRDLayer) for m in model.base_model.model]
    assert sorted(wrapped) == [False, True]


def test_hooks_on_the_base_layer_run():
    model, _, args = adapted("Linear", 3)
    calls = []
    base_layer = model.base_model.model.inner.base_layer
    base_layer.register_forward_hook(lambda *_: calls.append("called"))
    model(*args)
    assert calls == ["called"]


def test_an_error_inside_the_base_layer_leaves_the_weights_alone():
    model, base, _ = adapted("Linear", 3, init_weights=False)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 99, dtype=torch.float64))
    layer = model.base_model.model.inner
    assert torch.equal(layer.base_layer.weight, base.weight)
    assert isinstance(layer.base_layer.weight, nn.Parameter)


def test_the_weight_that_others_read_has_the_delta_in_it():
    model, base, _ = adapted("Linear", 15, init_weights=False)
    layer = model.base_model.model.inner
    deltas = dense_deltas(layer)
    assert_close(layer.weight, base.weight + deltas["weight"])
    assert_close(layer.bias, base.bias + deltas["bias"])
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight


def test_reading_a_weight_writes_to_none():
    model, base, (x,) = adapted("Linear", 15, init_weights=False)
    layer = model.base_model.model.inner
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(layer.weight, base.weight)
        assert layer.merged
        assert torch.equal(layer(x), base(x))
        assert not layer.merged


def test_multi_head_attention_uses_deltas_of_its_output_projection():
    torch.manual_seed(0)
    attention = Holder(nn.MultiheadAttention(4, 2, batch_first=True).double())
    base = copy.deepcopy(attention.inner)
    size = sum(p.numel() for p in attention.parameters())
    config = IRDConfig(budget=size, method="random", init_weights=False)
    model = get_peft_model(attention, config, autocast_adapter_dtype=False)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    outer = model.base_model.model.inner
    inner = outer.base_layer.out_proj
    assert isinstance(inner, IRDLayer)
    oracle = oracles.with_dense_deltas(
        base,
        dense_deltas(outer)
        | {f"out_proj.{k}": v for k, v in dense_deltas(inner).items()},
    )
    expected = oracle(x, x, x)[0]
    assert_close(model(x, x, x)[0], expected, **TOL[torch.float64])
    model(x, x, x)[0].sum().backward()
    assert inner.irdelta_values["default"]["weight"].grad.abs().sum() > 0
    merged = model.merge_and_unload()
    assert not any(isinstance(m, IRDLayer) for m in merged.modules())
    assert_close(merged(x, x, x)[0], expected, **TOL[torch.float64])


def seeded(make):
    torch.manual_seed(0)
    return make()


def pruned():
    return prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: weight_norm(nn.Linear(4, 3)), (5, 4)),
        (lambda: spectral_norm(nn.Linear(4, 3)), (5, 4)),
        (lambda: weight_norm(nn.Conv1d(2, 4, 3, groups=2)), (2, 2, 6)),
        (lambda: weight_norm(nn.Embedding(7, 4)), None),
        (pruned, (5, 4)),
    ],
)
def test_a_weight_that_is_made_of_others_has_their_deltas(make, shape, dtype):
    base, inner = (seeded(make).to(dtype).eval() for _ in range(2))
    (x,) = tokens() if shape is None else (torch.randn(shape, dtype=dtype),)
    config = IRDConfig(
        target_modules=".*", density=1.0, method="random", init_weights=False
    )
    model = get_peft_model(Holder(inner), config, autocast_adapter_dtype=False)
    oracle = Holder(base)
    for path, layer in layers_of(model).items():
        for name, delta in dense_deltas(layer).items():
            oracle.get_submodule(path).get_parameter(name).data += delta
    expected, output = oracle(x), model(x)
    assert_close(output, expected, **TOL[dtype])
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    for path, layer in layers_of(model).items():
        for name, values in layer.irdelta_values["default"].items():
            dense_gradient = oracle.get_submodule(path).get_parameter(name).grad
            at = dense_gradient.flatten()[layer.irdelta_indices["default"][name]]
            assert_close(values.grad, at, **TOL[dtype])


def test_wav2vec2_trains_merges_and_unloads():
    """Its convolution of positions has a weight that is normalised."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (4, 4)}
    sizes |= {"conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes))
    model = model.double().eval()
    base, oracle = copy.deepcopy(model), copy.deepcopy(model)
    config = IRDConfig(density=0.05, method="random", init_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    for path, layer in layers_of(model).items():
        for name, delta in dense_deltas(layer).items():
            oracle.get_submodule(path).get_parameter(name).data += delta
    x, labels = torch.randn(3, 400, dtype=torch.float64), torch.tensor([0, 1, 1])
    found, expected = (each(x, labels=labels) for each in (model, oracle))
    assert_close(found.logits, expected.logits, **TOL[torch.float64])
    assert not torch.equal(found.logits, base(x).logits)
    found.loss.backward()
    expected.loss.backward()
    conv = layers_of(model)["wav2vec2.encoder.pos_conv_embed.conv"]
    bias = oracle.wav2vec2.encoder.pos_conv_embed.conv.bias
    at = bias.grad[conv.irdelta_indices["default"]["bias"]]
    assert_close(conv.irdelta_values["default"]["bias"].grad, at, **TOL[torch.float64])
    assert torch.equal(copy.deepcopy(model).unload()(x).logits, base(x).logits)
    merged = model.merge_and_unload()(x).logits
    assert_close(merged, expected.logits, **TOL[torch.float64])


def test_a_copy_has_its_own_values():
    model, _, args = adapted("Linear", 5, init_weights=False)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(*args), model(*args))
    for values in clone.base_model.model.inner.irdelta_values["default"].values():
        values.data.zero_()
    assert not torch.equal(clone(*args), model(*args))


def test_a_model_survives_pickling():
    model, _, args = adapted("Linear", 5, init_weights=False)
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(clone(*args), model(*args))


def test_get_delta_weight_is_the_dense_delta():
    model, _, _ = adapted("Linear", 6, init_weights=False)
    layer = model.base_model.model.inner
    for name, expected in dense_deltas(layer).items():
        assert torch.equal(layer.get_delta_weight("default", name), expected)
    assert layer.get_delta_weight("nobody").count_nonzero() == 0


def test_a_module_held_by_two_parents_is_replaced_in_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Sequential(self.a)

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    model = Twice().double()
    base = copy.deepcopy(model)
    config = IRDConfig(density=1.0, method="random", init_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    inner = model.base_model.model
    assert inner.a is inner.b[0]
    oracle = oracles.with_dense_deltas(
        base, {f"a.{k}": v for k, v in dense_deltas(inner.a).items()}
    )
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_close(model(x), oracle(x), **TOL[torch.float64])
    unloaded = model.unload()
    assert unloaded.a is unloaded.b[0]
    assert isinstance(unloaded.a, nn.Linear)


def test_a_support_that_was_left_behind_is_found_again():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8))
    settings = IRDConfig(
        target_modules=["0"], density=0.1, method="random", init_weights=False
    )
    model = get_peft_model(base, settings)
    x = torch.randn(3, 8)
    expected = model(x)
    (layer,) = (m for m in model.modules() if isinstance(m, IRDLayer))
    support = layer._supports["default"]["weight"]
    layout = support.layout(layer._indices("default")["weight"])
    for away in (
        replace(support, held=torch.cat(layout).to("meta")),
        replace(support, block=support.shape, kind="meta"),
    ):
        layer._supports["default"]["weight"] = away  # as if the indices had gone alone
        assert torch.equal(model(x), expected)
        assert layer._supports["default"]["weight"] == support


def test_replicas_of_data_parallel_are_refused():
    config = IRDConfig(method="random", density=0.5, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    layer = model.base_model.model[0]
    layer(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="Start the script by torchrun"):
        layer._replicate_for_data_parallel()(torch.randn(2, 4))


@pytest.mark.parametrize(
    "make", [nn.LayerNorm, LlamaRMSNorm, T5LayerNorm, lambda n: nn.GroupNorm(2, n)]
)
def test_small_deltas_of_norms_act_on_low_precision(make):
    torch.manual_seed(0)
    settings = IRDConfig(density=1.0, method="random", target_modules=["0"])
    model = get_peft_model(nn.Sequential(make(64)).bfloat16(), settings)
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    before = model(x)
    model.base_model.model[0].irdelta_values["default"]["weight"].data.fill_(3e-3)
    assert (model(x) != before).double().mean() > 0.2


class ScaledLayerNorm(nn.LayerNorm):
    """A norm that gives a scale, too, as that of I-BERT."""

    def forward(self, x):
        return super().forward(x), x.abs().max()


@pytest.mark.parametrize("is_hooked", [False, True])
def test_a_low_precision_norm_may_give_more_than_a_tensor(is_hooked):
    torch.manual_seed(0)
    settings = IRDConfig(density=1.0, method="random", target_modules=["0"])
    model = get_peft_model(nn.Sequential(ScaledLayerNorm(8)).bfloat16(), settings)
    layer = model.base_model.model[0]
    if is_hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    layer.irdelta_values["default"]["weight"].data.fill_(1.0)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    for _ in range(2):
        found, scale = model(x)
        assert scale == x.abs().max()
        assert_close(found, 2 * nn.functional.layer_norm(x, (8,)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_do_not_depend_on_the_default_type(dtype):
    torch.manual_seed(0)
    norm = nn.Sequential(nn.LayerNorm(8)).to(dtype)
    settings = IRDConfig(density=0.3, method="random", init_weights=False)
    model, x = get_peft_model(norm, settings), torch.randn(3, 8, dtype=dtype)
    assert len(model.base_model.model[0].entry_counts("default")) == 1
    expected = model(x)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:.*(trace|TracerWarning)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_traced_model_computes_with_what_it_is_given(dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU()).to(dtype)
    settings = IRDConfig(density=0.5, method="random", init_weights=False)
    model = get_peft_model(base, settings, autocast_adapter_dtype=False)
    first, second = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    with torch.no_grad():
        traced = torch.jit.trace(model, first)
        torch.testing.assert_close(traced(second), model(second), rtol=0.02, atol=0.02)
        assert not torch.equal(traced(first), traced(second))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("make", [nn.LayerNorm, lambda size: nn.Linear(size, size)])
def test_hooks_on_a_low_precision_layer_see_the_delta(make, is_compiled):
    torch.manual_seed(0)
    base = nn.Sequential(make(64)).bfloat16()
    settings = IRDConfig(density=0.5, method="random", init_weights=False)
    model = get_peft_model(base, settings, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.base_layer.register_forward_hook(lambda *call: 2 * call[-1])
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    run = torch.compile(model, backend="eager", fullgraph=True)
    found = (run if is_compiled else model)(x).float()
    model.merge_adapter()
    torch.testing.assert_close(found, model(x).float(), rtol=0.03, atol=0.3)


COMPILED = {
    "norm": lambda: nn.LayerNorm(4),
    "custom": Scale,
    "hooked": lambda: nn.Linear(4, 4),
}


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_modules_that_are_compiled_in_place_have_their_deltas(kind):
    """Their calls go to what was compiled, whose parameters are the base's."""
    torch.manual_seed(0)
    base, x = COMPILED[kind](), torch.randn(2, 4)
    base.compile(backend="eager")
    if kind == "hooked":
        base.register_forward_hook(lambda *_: None)
    settings = IRDConfig(density=1.0, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(base), settings)
    plain = base(x)
    active = model(x)
    assert not torch.allclose(active, plain)
    model.merge_adapter()
    assert_close(model(x), active, **TOL[torch.float32])


def test_entries_of_a_parameter_that_a_linear_layer_has_besides():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 4, bias=False)
            self.scale = nn.Parameter(torch.ones(4))

    layer, x = wrap(Scaled()), torch.randn(2, 4)
    layer.update_layer("one", {"scale": torch.tensor([0, 2])}, {"scale": 2}, False)
    layer.set_adapter(["one"])
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer.scale, torch.ones(4))


def test_threads_in_a_forward_that_a_library_replaced_leave_the_base_alone():
    """As accelerate's: the module itself is lent other tensors for the call."""
    torch.manual_seed(0)
    base, x = nn.LayerNorm(4), torch.randn(2, 4)
    original, calls = base.weight, []
    first_came, second_came, first_left = (threading.Event() for _ in range(3))

    def forward(x):
        calls.append(x)
        if len(calls) == 1:
            first_came.set()
            second_came.wait(0.3)
        else:
            second_came.set()
            first_left.wait(0.3)
        return nn.LayerNorm.forward(base, x)

    settings = IRDConfig(density=1.0, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(base), settings)
    expected = model(x)
    base.forward = forward
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(model, x)
        assert first_came.wait(60)
        second = threads.submit(model, x)
        assert torch.equal(first.result(), expected)
        first_left.set()
        assert torch.equal(second.result(), expected)
    assert base.weight is original


def test_layers_without_deltas_in_force_can_be_transformed():
    torch.manual_seed(0)
    settings = {"density": 0.5, "method": "random", "init_weights": False}
    base, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    first, second = (IRDConfig(target_modules=[name], **settings) for name in "01")
    model = get_peft_model(base, first, "one")
    model.add_adapter("two", second)
    parameters = dict(model.named_parameters())

    def total(parameters):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    with ways.forced(way="dense"):
        found = torch.func.grad(total)(parameters)
    key = "base_model.model.0.irdelta_values.one.weight"
    total(parameters).backward()
    assert_close(found[key], parameters[key].grad)


def test_an_offloaded_module_that_cannot_take_a_delta_says_so():
    settings = IRDConfig(density=1.0, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(Scale()), settings)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'0\.[ab]' is offloaded.*exclude_modules"):
        model(torch.randn(2, 4))
