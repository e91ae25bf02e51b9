"""Layers with a delta inside what surrounds a forward and a backward pass."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from peft_ird import IRDConfig
from peft_ird.layers.kinds import Embedding, Linear
from peft_ird.layers.layer import IRDLayer
from peft_ird.sparse import lending
from peft_ird.sparse.lending import with_delta
from peft_ird.sparse.linear import linear
from peft_ird.sparse.products import available
from peft_ird.sparse.separate import plus_product
from peft_ird.sparse.ways import WAYS, forced
from tests.conftest import make_batch, make_model, task_type
from tests.oracles import TOL

DOUBLE = TOL[torch.float64]


class Scaled(nn.Embedding):
    """Scales what it looks up, as Gemma's embedding does."""

    def forward(self, ids):
        return 3 * super().forward(ids)


class Shifted(nn.Embedding):
    """Looks up other rows than it is asked for, as OPT's position embedding does."""

    def forward(self, ids):
        return super().forward((ids + 2) % self.num_embeddings)


def floats() -> Tensor:
    return torch.randn(4, 8, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.tensor([[0, 2, 2], [7, 0, 1]])


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), floats),
    "transposed": (lambda: Conv1D(6, 8), floats),
    "embedding": (lambda: nn.Embedding(8, 6), tokens),
    "scaled": (lambda: Scaled(8, 6), tokens),
    "shifted": (lambda: Shifted(8, 6), tokens),
}


@pytest.fixture(params=LAYERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def settings(density=0.3) -> IRDConfig:
    return IRDConfig(density=density, method="random", init_weights=False)


def adapted(module: nn.Module, density=0.3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(module)
    return get_peft_model(model, settings(density), autocast_adapter_dtype=False)


def layer_of(model: nn.Module) -> IRDLayer:
    return next(m for m in model.modules() if isinstance(m, IRDLayer))


def write_deltas(model: nn.Module) -> None:
    """Move each delta into the base weight, one by one."""
    for layer in (m for m in model.modules() if isinstance(m, IRDLayer)):
        for adapter, values in layer.irdelta_values.items():
            for name, numbers in values.items():
                flat = layer.get_base_layer().get_parameter(name).data.view(-1)
                indices = layer.irdelta_indices[adapter][name].tolist()
                for index, value in zip(indices, numbers.detach(), strict=True):
                    flat[index] += value
                numbers.data.zero_()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def flipped_input(_module, args):
    return (args[0].flip(0), *args[1:])


def doubled_output(_module, _args, output):
    return 2 * output


@pytest.mark.parametrize("hooks", ["none", "before", "after", "both"])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_hooks_and_subclasses_see_the_delta_as_part_of_the_weight(
    kind, hooks, is_compiled
):
    make, data = LAYERS[kind]
    module = make().double()
    if hooks in {"before", "both"}:
        module.register_forward_pre_hook(flipped_input)
    if hooks in {"after", "both"}:
        module.register_forward_hook(doubled_output)
    model, x = adapted(module), data()
    call = model
    if is_compiled:
        torch.compiler.reset()
        call = torch.compile(model, backend="eager", fullgraph=True)
    found = call(x)
    write_deltas(model)
    assert_close(found, model(x), **DOUBLE)


class Made(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(each) for each in tree_leaves((args, kwargs))}
        for each in tree_leaves(result):
            is_made = isinstance(each, Tensor) and not func.is_view
            if is_made and id(each) not in given:  # which it writes to
                self.size = max(self.size, each.numel())
        return result


@pytest.mark.parametrize("is_keyword", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [nn.Embedding, Scaled, Shifted])
def test_looking_rows_up_makes_no_table(make, dtype, is_keyword):
    model = adapted(make(5000, 6).to(dtype), density=0.01)
    layer, ids = layer_of(model), tokens()
    named = "input" if make is nn.Embedding else "ids"
    with Made() as made:
        y = layer(**{named: ids}) if is_keyword else layer(ids)
        y.sum().backward()
    assert 0 < made.size < 5000
    values = layer.irdelta_values["default"]["weight"]
    assert values.grad is not None


@pytest.mark.parametrize(("make", "named"), [(nn.Linear, "input"), (Conv1D, "x")])
def test_a_call_by_keyword_is_the_same_call(make, named, monkeypatch):
    layer, x = layer_of(adapted(make(8, 8))), torch.randn(2, 8)
    expected = layer(x)
    monkeypatch.setattr(IRDLayer, "_run", None)  # what makes a weight with the delta
    assert_close(layer(**{named: x}), expected, rtol=0, atol=0)


class Normed(nn.Embedding):
    """Divides by the norm of the whole table: not of the rows that it looks up only."""

    calls = 0

    def forward(self, ids):
        self.calls += 1
        return super().forward(ids) / self.weight.norm()


def test_a_table_that_is_read_in_another_way_has_its_deltas_too():
    model, ids = adapted(Normed(8, 6).double()), tokens()
    base = layer_of(model).get_base_layer()
    found = [model(ids) for _ in range(3)]
    assert base.calls == 1  # as it is, and from then on with another table
    write_deltas(model)
    for each in found:
        assert_close(each, model(ids), **DOUBLE)


def test_a_forward_of_the_instance_is_run():
    model, x = adapted(nn.Linear(8, 6).double()), floats()
    base = layer_of(model).get_base_layer()
    without = base.forward
    expected = model(x) + 1
    base.forward = lambda x: without(x) + 1
    assert_close(model(x), expected, **DOUBLE)


@pytest.mark.parametrize("is_inner", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        LoraConfig(target_modules=["0"], r=2, init_lora_weights=False),
        OFTConfig(target_modules=["0"], oft_block_size=4, r=0, init_weights=False),
    ],
)
def test_other_tuners_see_the_delta_as_part_of_the_weight(other, is_inner):
    torch.manual_seed(0)
    first, second = (other, settings()) if is_inner else (settings(), other)
    base = nn.Sequential(nn.Linear(8, 8).double())
    model = get_peft_model(base, copy.deepcopy(first), "one", mixed=True)
    model.add_adapter("two", copy.deepcopy(second))
    model.set_adapter(["one", "two"])
    model.double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    x = floats()
    found = model(x)
    write_deltas(model)
    assert_close(found, model(x), **DOUBLE)


class Tied(nn.Module):
    """Embeddings and a head with one weight."""

    def __init__(self, is_head_first: bool) -> None:
        super().__init__()
        if is_head_first:
            self.head = nn.Linear(4, 6, bias=False)
        self.table = nn.Embedding(6, 4)
        if not is_head_first:
            self.head = nn.Linear(4, 6, bias=False)
        self.table.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize("is_copy", [False, True])
@pytest.mark.parametrize("is_head_first", [False, True])
def test_a_tied_table_is_not_read_while_a_head_has_its_delta_in_it(
    is_head_first, is_copy
):
    model = get_peft_model(Tied(is_head_first), settings())
    model = copy.deepcopy(model) if is_copy else model
    head, table = model.base_model.model.head, model.base_model.model.table
    assert isinstance(head, Linear)
    assert isinstance(table, Embedding)
    assert head.is_applied_in_weight(torch.randn(2, 4))
    ids = torch.arange(6)
    expected, found = table(ids), []
    thread = threading.Thread(target=lambda: found.append(table(ids)))
    weight = head.get_base_layer().weight

    def look(merged: torch.Tensor) -> torch.Tensor:
        thread.start()
        thread.join(0.05)
        return merged

    with_delta(weight, torch.arange(24), torch.ones(24), look)
    thread.join()
    assert torch.equal(found[0], expected)


def test_large_weights_have_different_locks():
    weights = [torch.empty(1024, 1024) for _ in range(8)]
    assert len({id(lending._lock(weight)) for weight in weights}) > 2


def test_one_lock_per_weight_keeps_threads_apart():
    weight, indices = torch.zeros(4), torch.tensor([1])
    entered, errors = threading.Event(), []

    def enter(merged):
        entered.set()
        if merged[1] != 1:
            errors.append(merged.clone())
        return merged

    def wait(merged):
        thread.start()
        assert not entered.wait(0.05)
        return merged

    thread = threading.Thread(
        target=with_delta, args=(weight, indices, torch.ones(1), enter)
    )
    with_delta(weight, indices, torch.full((1,), 5.0), wait)
    thread.join()
    assert entered.is_set()
    assert not errors
    assert not weight.any()


def test_a_layer_first_used_in_inference_mode_can_be_trained(kind):
    make, data = LAYERS[kind]
    model = adapted(make().double(), density=0.05)
    layer = layer_of(model)
    layer._unchecked.add("default")
    with torch.inference_mode():
        model(data())
    assert not layer._unchecked
    model(data()).sum().backward()
    assert all(g is not None for g in gradients(model).values())


def test_weights_made_in_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        module = nn.Linear(8, 6).double()
    model, x = adapted(module), floats()
    with torch.no_grad():
        found = model(x)
    with torch.inference_mode():
        assert torch.equal(found, model(x))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_moved_or_loaded_adapter_compiles_whole(kind, backend, dtype, is_loaded):
    torch.compiler.reset()
    make, data = LAYERS[kind]
    model = adapted(make().double()).to(dtype)
    x = data()
    x = x.to(dtype) if x.is_floating_point() else x
    plain = copy.deepcopy(model)
    expected = plain(x)
    (expected / 8).sin().sum().backward()  # rounding of outputs matters little
    wanted = gradients(plain)
    if is_loaded:
        model.load_state_dict(plain.state_dict())
    found = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert_close(found, expected, **TOL[dtype])
    (found / 8).sin().sum().backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, wanted[name], **TOL[dtype])


def test_weights_may_go_to_meta_and_come_back(kind):
    make, data = LAYERS[kind]
    model, x = adapted(make().double(), density=0.05), data()
    expected, saved = model(x), copy.deepcopy(model.state_dict())
    model.to("meta")
    assert model(x.to("meta")).shape == expected.shape
    layer = layer_of(model)
    model.to_empty(device="cpu")
    for indices in layer.irdelta_indices["default"].values():
        indices.fill_(10**9)  # what lay in memory
    model.to("cpu")
    with pytest.raises(ValueError, match="must lie in"):
        model(x)
    model.load_state_dict(saved)
    assert torch.equal(model(x), expected)


def test_other_entries_loaded_in_place_are_the_ones_that_act(kind):
    make, data = LAYERS[kind]
    first, x = adapted(make().double()), data()
    torch.manual_seed(1)
    second = get_peft_model(
        nn.Sequential(make().double()),
        IRDConfig(density=0.3, method="random", init_weights=False, seed=7),
        autocast_adapter_dtype=False,
    )
    wanted = layer_of(second).entry_counts("default")
    if layer_of(first).entry_counts("default") != wanted:
        layer_of(first).update_layer(
            "default", dict(layer_of(second).irdelta_indices["default"].items()), wanted
        )
    first.load_state_dict(second.state_dict())
    found = first(x)
    write_deltas(first)
    assert_close(found, first(x), **DOUBLE)


def loss_of(model, x):
    def loss(values):
        return torch.func.functional_call(model, values, (x,)).sin().sum()

    return loss


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_function_transforms_give_what_backward_gives(kind):
    make, data = LAYERS[kind]
    model, x = adapted(make().double()), data()
    values = trainable(model)
    loss_of(model, x)(dict(model.named_parameters())).backward()
    wanted = gradients(model)
    for name, gradient in torch.func.grad(loss_of(model, x))(values).items():
        assert_close(gradient, wanted[name], **DOUBLE)
    per_sample = torch.func.vmap(
        lambda one: torch.func.grad(loss_of(model, one[None]))(values)
    )(x)
    for name, gradient in per_sample.items():
        assert_close(gradient.sum(0), wanted[name], **DOUBLE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_gives_what_backward_gives(kind):
    make, data = LAYERS[kind]
    model, x = adapted(make().double()), data()
    values = trainable(model)
    directions = {name: torch.randn_like(v) for name, v in values.items()}
    loss_of(model, x)(dict(model.named_parameters())).backward()
    wanted = sum((directions[n] * g).sum() for n, g in gradients(model).items())
    _, found = torch.func.jvp(loss_of(model, x), (values,), (directions,))
    assert_close(found, wanted, **DOUBLE)
    with forward_ad.dual_level():
        dual = {
            name: forward_ad.make_dual(v, directions[name])
            for name, v in values.items()
        }
        found = forward_ad.unpack_dual(loss_of(model, x)(dual)).tangent
    assert_close(found, wanted, **DOUBLE)


@pytest.mark.parametrize("way", [*WAYS, None])
def test_a_graph_of_the_gradients_is_refused(kind, way):
    make, data = LAYERS[kind]
    model, x = adapted(make().double()), data()
    values = layer_of(model).irdelta_values["default"]["weight"]
    with forced(way=way):
        loss = model(x).sin().sum()
        with pytest.raises(RuntimeError, match=r'forced\(way="dense"\)'):
            torch.autograd.grad(loss, values, create_graph=True)


def test_the_dense_way_can_be_differentiated_twice(kind):
    make, data = LAYERS[kind]
    base = make().double()
    model, x = adapted(base), data()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    layer = layer_of(model)
    values = layer.irdelta_values["default"]["weight"]
    inputs = [values, x] if x.requires_grad else [values]

    def twice(output):
        grads = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    with forced(way="dense"):
        found = twice(model(x))
    weights = {}
    for name, entries in layer.irdelta_values["default"].items():
        weight = getattr(base, name).detach()
        indices = layer.irdelta_indices["default"][name].long()
        merged = weight.flatten().index_add(0, indices, entries)
        weights[name] = merged.view_as(weight)
    expected = twice(torch.func.functional_call(base, weights, (x,)))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **DOUBLE)


def test_an_empty_adapter_costs_nothing():
    model, x = adapted(nn.Linear(8, 6).double()), floats().requires_grad_()
    layer = layer_of(model)
    layer.update_layer("default", {"weight": torch.empty(0).int()}, {"weight": 0})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.shape) or t, lambda t: t
    ):
        output = layer(x)
    assert kept == [layer.get_base_layer().weight.t().shape]
    assert torch.equal(output, layer.get_base_layer()(x))


def test_unfrozen_base_weights_are_trained_too():
    model, x = adapted(nn.Linear(8, 6).double()), floats()
    weight = layer_of(model).get_base_layer().weight.requires_grad_(True)
    model(x).sin().sum().backward()
    values = layer_of(model).irdelta_values["default"]["weight"]
    indices = layer_of(model).irdelta_indices["default"]["weight"].long()
    assert_close(values.grad, weight.grad.flatten()[indices], **DOUBLE)


def test_merged_and_active_outputs_are_the_same_to_the_last_bit():
    for make in (lambda: nn.Linear(32, 16), lambda: Conv1D(16, 32)):
        model, x = adapted(make()), torch.randn(3, 5, 32)
        active = model(x)
        model.merge_adapter()
        assert torch.equal(model(x), active)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_type_of_a_model_may_change_after_injection(kind, dtype):
    make, data = LAYERS[kind]
    model, x = adapted(make(), density=0.05).to(dtype), data()
    x = x.to(dtype) if x.is_floating_point() else x
    found = model(x)
    found.sum().backward()
    assert found.dtype == dtype
    assert all(g.dtype == dtype for g in gradients(model).values())
    write_deltas(model)
    assert_close(found, model(x), **TOL[dtype])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_models_have_the_same_gradients(name, use_reentrant):
    chosen = IRDConfig(
        density=0.05, method="random", init_weights=False, task_type=task_type(name)
    )
    model = get_peft_model(make_model(name).double(), chosen)
    batch = make_batch(name)
    model(**batch).loss.backward()
    wanted = {n: g.clone() for n, g in gradients(model).items() if g is not None}
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    for n, gradient in wanted.items():
        assert_close(gradients(model)[n], gradient, **DOUBLE)


def test_deterministic_algorithms_suffice(kind):
    make, data = LAYERS[kind]
    model = adapted(make().double())
    torch.use_deterministic_algorithms(True)
    try:
        model(data()).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(g is not None for g in gradients(model).values())


def test_inputs_changed_afterwards_are_noticed_or_do_not_matter():
    model = adapted(nn.Linear(8, 6).double(), density=1.0)
    x = floats()
    output = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_delta_of_a_layer_without_bias_is_applied_to_a_vector():
    model = adapted(nn.Linear(8, 6, bias=False).double())
    layer, x = layer_of(model), torch.randn(8, dtype=torch.float64)
    delta = layer._delta("default", "weight")
    weight = layer.get_base_layer().weight
    wanted = (weight + layer.get_delta_weight("default")) @ x
    assert_close(linear(x, weight, None, delta), wanted, **DOUBLE)
    assert_close(model(x), wanted, **DOUBLE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gradient", available(torch.device("cpu")))
def test_autocast_does_not_lower_the_precision_of_a_delta(way, gradient):
    model, x = adapted(nn.Linear(8, 6)), torch.randn(4, 8)
    layer, results = layer_of(model), []
    delta = layer._delta("default", "weight")
    for is_on in (False, True):
        model.zero_grad()
        point = x.clone().requires_grad_()
        with forced(gradient=gradient), torch.autocast("cpu", enabled=is_on):
            if way == "separate":
                output = plus_product(torch.zeros(4, 6), point, delta)
            else:
                with torch.autocast("cpu", enabled=False):
                    output = linear(point, layer.get_base_layer().weight, None, delta)
            output.sin().sum().backward()
        results.append((output, delta.values.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_deleted_adapter_leaves_nothing_behind(is_loaded, tmp_path):
    torch.manual_seed(0)
    config = IRDConfig(density=0.3, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    model.save_pretrained(tmp_path)
    if is_loaded:
        model.load_adapter(tmp_path, "other")
    else:
        model.add_adapter("other", IRDConfig(density=0.5, method="random"))
    model.delete_adapter("other")
    layer = model.base_model.model[0]
    x = torch.randn(3, 8)
    expected = F.linear(
        x,
        layer.base_layer.weight + layer.get_delta_weight("default"),
        layer.base_layer.bias + layer.get_delta_weight("default", "bias"),
    )
    model.to(torch.float64)  # looks at the entries of all adapters again
    assert_close(model(x.double()).float(), expected, **TOL[torch.float32])
    assert not any("other" in vars(layer)[name] for name in (
        "_unchecked", "_supports", "_fingerprints", "_numels"))  # fmt: skip
    assert not any(".other" in key for key in model.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_derivatives_inside_a_compiled_function_are_right(backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), settings(0.3)).double()
    x, t = torch.randn(2, 3, 8, dtype=torch.float64)

    def forward(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.jvp(model, (x,), (t,))[1]

    def reverse(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (model(x) * model(t)).sum())(x)

    layer = model.base_model.model[0]
    weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
    expected = {forward: t @ weight.t(), reverse: model(t) @ weight}
    for derivative, wanted in expected.items():
        found = torch.compile(derivative, backend=backend, fullgraph=True)(x, t)
        assert_close(found, wanted, **TOL[torch.float64])
