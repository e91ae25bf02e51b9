"""Linear layers and embeddings with a sparse delta, against the dense computation."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_ird import IRDConfig
from peft_ird.layers.layer import IRDLayer
from peft_ird.sparse import costs, lending, products
from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.embedding import plus_rows
from peft_ird.sparse.lending import with_delta
from peft_ird.sparse.linear import linear
from peft_ird.sparse.products import available
from peft_ird.sparse.separate import linear_and_product, plus_product
from peft_ird.sparse.support import Support
from peft_ird.sparse.ways import WAYS, forced
from tests import oracles
from tests.conftest import make_batch, make_model
from tests.oracles import TOL

DOUBLE = TOL[torch.float64]
METHODS = available(torch.device("cpu"))


@dataclass
class Problem:
    """A frozen weight, a delta on it and an input."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    delta: SparseDelta
    is_transposed: bool
    multiple: int = 1  # of rows and columns in use, as on a GPU

    def dense(self, values: Tensor) -> Tensor:
        merged = self.weight.clone().reshape(-1)
        merged = merged.index_add(0, self.delta.indices.long(), values)
        merged = merged.view(self.weight.shape)
        return F.linear(self.x, merged.t() if self.is_transposed else merged, self.bias)

    def sparse(self, way: str, method: str = "block") -> Tensor:
        assert self.delta.support is not None
        support = replace(self.delta.support, gradient=method)
        delta = replace(self.delta, support=support)
        if way == "in_weight":
            return linear(self.x, self.weight, self.bias, delta, self.is_transposed)
        weight = self.weight.t() if self.is_transposed else self.weight
        y = F.linear(self.x, weight, self.bias)
        return plus_product(y, self.x, delta, self.is_transposed)


def some_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, otherwise in memory."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([tensor, -tensor], -1)[..., 0]
    return tensor


def support_of(indices, shape, dtype=torch.float32, multiple=1, is_held=False):
    """A support with the habits of a GPU: rows in multiples, and a layout held."""
    holding = ("cpu",) if is_held else ()
    with (
        mock.patch.dict("peft_ird.sparse.support._MULTIPLE", cpu=multiple),
        mock.patch("peft_ird.sparse.support._HOLDING", holding),
    ):
        return Support.of(indices, torch.Size(shape), dtype)


@st.composite
def problems(draw, dtype=torch.float64):
    o, i = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    is_transposed = draw(st.booleans())
    shape = torch.Size((i, o) if is_transposed else (o, i))
    rows, columns = (
        draw(st.sets(st.integers(0, side - 1), max_size=side)) for side in shape
    )
    cells = [r * shape[1] + c for r in sorted(rows) for c in sorted(columns)]
    chosen = sorted(draw(st.sets(st.sampled_from(cells)))) if cells else []
    if draw(st.booleans()):
        chosen = cells
    batch = draw(st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0), (1, 2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def floats(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    layouts = st.sampled_from(["plain", "transposed", "strided"])
    x = some_layout(floats(*batch, i), draw(layouts)).requires_grad_()
    weight = some_layout(floats(*shape), draw(layouts))
    bias = floats(o).requires_grad_() if draw(st.booleans()) else None
    indices = torch.tensor(chosen, dtype=torch.int32)
    multiple = draw(st.integers(1, 4))
    support = support_of(indices, shape, dtype, multiple, draw(st.booleans()))
    values = floats(len(chosen)).requires_grad_()
    delta = SparseDelta(indices, values, shape, support)
    return Problem(x, weight, bias, delta, is_transposed, multiple)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, max(1, output.numel()), dtype=output.dtype)
    loss = (output.sin() * weights[: output.numel()].view(output.shape)).sum()
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(inputs, found, strict=True)
    ]


@given(problems(), st.sampled_from(WAYS), st.sampled_from(METHODS))
def test_output_and_gradients_are_the_dense_ones(problem, way, method):
    before = problem.weight.clone()
    inputs = [problem.x, problem.delta.values]
    inputs += [] if problem.bias is None else [problem.bias]
    expected = problem.dense(problem.delta.values)
    found = problem.sparse(way, method)
    assert found.shape == expected.shape
    assert_close(found, expected, **DOUBLE)
    pairs = zip(gradients(found, inputs), gradients(expected, inputs), strict=True)
    for mine, theirs in pairs:
        assert_close(mine, theirs, **DOUBLE)
    assert torch.equal(problem.weight, before)


@given(problems(), st.sampled_from(WAYS), st.sampled_from(METHODS))
def test_gradcheck_passes(problem, way, method):
    if not problem.delta.values.numel():
        return

    def call(x, values):
        delta = replace(problem.delta, values=values)
        return replace(problem, x=x, delta=delta).sparse(way, method)

    assert torch.autograd.gradcheck(call, (problem.x, problem.delta.values))


@given(problems(), st.integers(1, 40))
def test_tiles_of_any_size_give_the_same(problem, size):
    x = problem.x.detach().reshape(-1, problem.x.shape[-1])
    left = torch.randn(len(x), 7, dtype=x.dtype)
    places = torch.arange(0, 7 * x.shape[1], 2)
    expected = (left.t() @ x).flatten()[places]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_TILE_BYTES", 4 * size)
        patch.setattr(products, "_TURNED", size)
        assert_close(products.by_block(left, x, places), expected, **DOUBLE)
        assert_close(products.by_sampling(left, x, places), expected, **DOUBLE)


@pytest.mark.parametrize("tokens", [0, 1, 31, 96, 384, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_portions_of_a_matrix_are_turned(tokens, dtype):
    matrix = torch.randn(tokens, 10).to(dtype)
    empty = torch.empty(10, 0)
    for some in (matrix, matrix[:, ::2]):
        found = list(products.turned(some))
        assert all(each.is_contiguous() for each in found)
        joined = torch.cat([empty[: some.shape[1]], *found], 1)
        assert torch.equal(joined, some.float().t())


def test_sampled_products_do_not_depend_on_the_number_of_threads():
    """Processes that select together may have fewer of them than one alone."""
    left, right = torch.randn(500, 40), torch.randn(500, 30)
    places = torch.arange(0, 1200, 7)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(products.by_sampling(left, right, places))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@given(problems())
def test_the_support_is_what_the_entries_use(problem):
    support, indices = problem.delta.support, problem.delta.indices.tolist()
    rows, columns, places = support.layout(problem.delta.indices)
    for side, used in ((0, rows), (1, columns)):
        assert torch.equal(support.used(problem.delta.indices, side), used)
        width = problem.weight.shape[1]
        size = problem.weight.shape[side]
        wanted = {(j // width, j % width)[side] for j in indices}
        others = [n for n in range(size) if n not in wanted]
        wanted = sorted([*wanted, *others[: -len(wanted) % problem.multiple]])
        if 0 < len(wanted) <= size / 2:
            assert used.tolist() == wanted
            assert support.block[side] == len(wanted)
        else:
            assert not len(used)
            assert support.block[side] == size
    delta = oracles.dense(*indices_and_values(problem), problem.weight.shape)
    rows = rows.long() if len(rows) else slice(None)
    columns = columns.long() if len(columns) else slice(None)
    block = support.dense(places, problem.delta.values)
    assert torch.equal(block.detach(), delta[rows][:, columns])


def indices_and_values(problem):
    return problem.delta.indices, problem.delta.values


def test_only_the_used_columns_of_the_input_are_kept():
    indices = torch.tensor([3, 7 * 64 + 3, 9 * 64 + 8], dtype=torch.int32)
    support = Support.of(indices, torch.Size((32, 64)), torch.float32)
    delta = SparseDelta(
        indices, torch.zeros(3, requires_grad=True), torch.Size((32, 64)), support
    )
    x, weight = torch.randn(10, 64, requires_grad=True), torch.randn(32, 64)
    known = {t.untyped_storage().data_ptr() for t in (weight, indices, delta.values)}
    kept = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        linear(x, weight, None, delta)
    assert [t.shape for t in kept] == [(10, 2)]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        linear(x, weight, None, replace(delta, values=delta.values.detach()))
    assert sum(t.numel() for t in kept) == 0


@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_the_weight_gets_every_bit_back(problem, dtype):
    weight = problem.weight.to(dtype) * 1e3
    before, version = weight.clone(), weight._version
    expected = before + oracles.dense(*indices_and_values(problem), weight.shape).to(
        dtype
    )
    found = with_delta(weight, *indices_and_values(problem), torch.clone)
    assert_close(found, expected, **TOL[dtype])
    assert torch.equal(weight, before)

    def interrupt(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as seen:
        with_delta(weight, *indices_and_values(problem), interrupt)
    assert torch.equal(weight, before)
    assert not lending._lock(weight).locked()
    del seen  # which holds all frames until here
    assert weight._version == version


def test_a_weight_that_other_processes_see_is_left_alone():
    weight = torch.randn(3, 3).share_memory_()
    before = weight.clone()

    def look(merged: Tensor) -> Tensor:
        assert torch.equal(weight, before)
        return merged.clone()

    merged = with_delta(weight, torch.tensor([4]), torch.ones(1), look)
    assert merged[1, 1] == before[1, 1] + 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory maps are Linux's")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_weight_in_a_file_is_left_alone(mode, tmp_path, monkeypatch):
    path, looks = tmp_path / "weight", []
    np.random.default_rng(0).random((6, 4), dtype=np.float32).tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode=mode, shape=(6, 4))
    look, kept = lending._is_mapped_privately, path.read_bytes()

    def noting(address: int) -> bool:
        looks.append((address, look(address)))
        return looks[-1][1]

    monkeypatch.setattr(lending, "_is_mapped_privately", noting)
    model, x = adapted(nn.Linear(4, 6)), torch.randn(2, 4)
    model.base_model.model[0].base_layer.weight.data = torch.from_numpy(mapped)
    for _ in range(3):
        found = model(x)
        found.sum().backward()
    assert looks == [(mapped.ctypes.data, mode == "c")]  # once
    assert path.read_bytes() == kept
    model.base_model.model[0].base_layer.weight.data = torch.tensor(np.array(mapped))
    assert_close(found, model(x))


def adapted(module: nn.Module, density=0.3, **options):
    config = IRDConfig(density=density, method="random", init_weights=False, **options)
    return get_peft_model(nn.Sequential(module), config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: Conv1D(6, 6)])
def test_a_weight_can_be_its_own_input(make):
    layer = adapted(make()).base_model.model[0]
    weight = layer.base_layer.weight
    assert torch.equal(layer(weight), layer(weight.clone()))


SMALL = 1e-4


def share_of_small_deltas(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what small deltas add to outputs, computed and exactly."""
    layer = model.base_model.model[0]
    for name, values in layer.irdelta_values["default"].items():
        values.data.fill_(SMALL if name == "weight" else 0.0)
    found = model(x).double()
    with model.disable_adapter():
        found -= model(x).double()
    dense = layer.get_delta_weight("default").double()
    kind = F.conv1d if dense.ndim == 3 else F.linear
    is_turned = isinstance(layer.get_base_layer(), Conv1D)
    return found, kind(x.double(), dense.t() if is_turned else dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(64, 6, bias=False),
        lambda: nn.Linear(64, 6),
        lambda: Conv1D(6, 64),
        lambda: nn.Conv1d(64, 6, 1, bias=False),
    ],
)
def test_small_deltas_are_not_lost_in_16_bits(make, dtype, is_autocast):
    """Weights of one would take nothing of them; the inputs cancel what these give."""
    base = make()
    nn.init.ones_(base.weight)
    if getattr(base, "bias", None) is not None:
        nn.init.zeros_(base.bias)
    inner = base if is_autocast else base.to(dtype)
    model = adapted(inner)
    for name, values in model.named_parameters():
        if "irdelta" in name and values.dtype == dtype:
            values.data = values.data.float()
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    rows = torch.stack([signs, -signs, 8 * signs])
    x = rows[..., None] if isinstance(base, nn.Conv1d) else rows
    with torch.autocast("cpu", dtype, enabled=is_autocast):
        found, exact = share_of_small_deltas(model, x if is_autocast else x.to(dtype))
    assert exact.abs().max() > SMALL
    assert_close(found, exact, rtol=0.02, atol=0.1 * SMALL)


def test_an_error_in_the_product_restores_the_weight():
    model = adapted(nn.Linear(4, 3))
    layer = model.base_model.model[0]
    before = layer.base_layer.weight.clone()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert torch.equal(layer.base_layer.weight, before)


def test_eight_threads_run_at_once():
    torch.manual_seed(0)
    model = adapted(nn.Linear(64, 64)).eval()
    before = model.base_model.model[0].base_layer.weight.clone()
    inputs = [torch.randn(16, 64) for _ in range(8)]
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    found: list[list[bool]] = [[] for _ in inputs]

    def work(n: int) -> None:
        with torch.inference_mode():
            for _ in range(50):
                found[n].append(torch.equal(model(inputs[n]), expected[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(each) == 50 and all(each) for each in found)
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own."""

    def forward(self, ids):
        return 3 * super().forward(ids)


class Ties(nn.Module):
    """A table that a head computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Scaled(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.table.weight

    def tie_weights(self, **_) -> None:
        self.head.weight = self.table.weight


def plainly(layer: nn.Module) -> Tensor:
    return layer(torch.linspace(-1, 1, 64 * 16).view(16, 64))


def in_low_precision(layer: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plainly(layer)


def beside_it(layer: nn.Module) -> Tensor:
    inputs = torch.linspace(-1, 1, 64 * 16).view(16, 64)
    weight = layer.get_base_layer().weight
    indices = torch.arange(0, 64 * 64, 7, dtype=torch.int32)
    support = support_of(indices, weight.shape)
    delta = SparseDelta(indices, torch.ones(len(indices)), weight.shape, support)
    return linear_and_product(inputs, weight, None, delta)


def looked_up(layer: nn.Module) -> Tensor:
    return layer(torch.arange(64))


class Gram(nn.Embedding):
    """An embedding that reads its weight through attributes as well."""

    def forward(self, ids):
        return super().forward(ids) @ (self.weight.T @ self.weight.data)


def test_a_table_that_is_read_through_attributes_has_its_delta():
    torch.manual_seed(0)
    model = adapted(Gram(9, 4).double())
    ids = torch.arange(9)
    found = model(ids)
    model.merge_adapter()
    assert_close(found, model(ids), **TOL[torch.float64])


@pytest.mark.parametrize(
    ("name", "other"),
    [("table", looked_up), ("head", in_low_precision), ("head", beside_it)],
)
def test_threads_that_compute_in_other_ways_see_no_delta(name, other):
    torch.manual_seed(0)
    settings = IRDConfig(density=1.0, method="random")
    inner = get_peft_model(Ties(), settings).eval().base_model.model
    for parameter in inner.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(5.0)
    found, is_over = [], threading.Event()

    def work() -> None:
        with torch.no_grad():
            while not is_over.is_set():
                plainly(inner.head)

    with torch.no_grad():
        expected = other(getattr(inner, name))
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(500):
            found.append(torch.equal(other(getattr(inner, name)), expected))
        is_over.set()
        thread.join()
    assert all(found)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("is_native", [False, True])
def test_eight_threads_may_be_the_first_to_use_what_was_loaded(
    kind, is_native, tmp_path
):
    torch.manual_seed(0)
    options = {"density": 0.1, "method": "random", "init_weights": False}
    model = get_peft_model(make_model(kind), IRDConfig(**options)).eval()
    model.save_pretrained(tmp_path)
    batch = make_batch(kind)
    with torch.inference_mode():
        expected = model(**batch).logits
    for _ in range(4):
        if is_native:
            loaded = make_model(kind)
            loaded.load_adapter(str(tmp_path))
        else:
            loaded = PeftModel.from_pretrained(make_model(kind), tmp_path)
        loaded.eval()

        def run(loaded: nn.Module = loaded) -> bool:
            with torch.inference_mode():
                return torch.equal(loaded(**batch).logits, expected)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda _: run(), range(16)))


class Twice(nn.Module):
    """Uses one layer twice, once under a checkpoint of some kind."""

    def __init__(self, layer: nn.Module, use_reentrant: bool | None) -> None:
        super().__init__()
        self.layer = layer
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.layer(x).tanh()
        if self.use_reentrant is None:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: Conv1D(6, 6)])
def test_double_use_and_checkpoints_and_two_forwards(make, use_reentrant, way):
    torch.manual_seed(0)
    base = make().double()
    model = adapted(Twice(copy.deepcopy(base), use_reentrant))
    layer = model.base_model.model[0].layer
    deltas = {
        name: oracles.dense(layer.irdelta_indices["default"][name], values, shape.shape)
        for name, values in layer.irdelta_values["default"].items()
        for shape in [base.get_parameter(name)]
    }
    dense = Twice(oracles.with_dense_deltas(base, deltas), None)
    x, z = (torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    with forced(way=way):
        # Two passes forward before one backward, which adds up twice.
        first, second = model(x.requires_grad_()), model(z.requires_grad_())
        for _ in range(2):
            (first.sin().sum() + second.cos().sum()).backward(retain_graph=True)
    for _ in range(2):
        (dense(x).sin().sum() + dense(z).cos().sum()).backward()
    for name, values in layer.irdelta_values["default"].items():
        wanted = dense.layer.get_parameter(name).grad.flatten()
        at = layer.irdelta_indices["default"][name].long()
        assert_close(values.grad, wanted[at], **DOUBLE)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: Conv1D(6, 8)])
def test_under_autocast_the_delta_is_separate_and_survives(make):
    torch.manual_seed(0)
    model = adapted(make())
    layer = model.base_model.model[0]
    layer.irdelta_values["default"]["weight"].data.fill_(1e-4)
    x = torch.randn(5, 8, requires_grad=True)
    assert layer.is_applied_in_weight(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not layer.is_applied_in_weight(x)
        output = model(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    values = layer.irdelta_values["default"]["weight"]
    assert values.grad.dtype == torch.float32
    upstream = (2 * output.float()).detach()
    dense = upstream.t() @ x.detach()
    dense = dense if isinstance(layer.base_layer, nn.Linear) else dense.t()
    at = layer.irdelta_indices["default"]["weight"].long()
    assert_close(values.grad, dense.flatten()[at], **TOL[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_get_a_product_of_its_own(dtype):
    torch.manual_seed(0)
    config = IRDConfig(density=0.3, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6).to(dtype)), config)
    layer = model.base_model.model[0]
    values = layer.irdelta_values["default"]["weight"]
    assert values.dtype == torch.float32
    x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    assert not layer.is_applied_in_weight(x)
    delta = layer.get_delta_weight("default").double()
    weight = layer.base_layer.weight.double() + delta
    bias = layer.base_layer.bias.double() + layer.get_delta_weight("default", "bias")
    output = model(x)
    assert_close(output.double(), F.linear(x.double(), weight, bias), **TOL[dtype])
    output.float().sum().backward()
    assert_close(x.grad.double(), weight.sum(0).expand(5, -1), **TOL[dtype])


def test_several_adapters_add_up():
    torch.manual_seed(0)
    model = adapted(nn.Linear(8, 6).double())
    config = IRDConfig(density=0.5, method="random", init_weights=False, seed=1)
    model.add_adapter("other", config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model[0]
    weight, bias = (
        layer.base_layer.get_parameter(name).double()
        + sum(layer.get_delta_weight(a, name) for a in ("default", "other"))
        for name in ("weight", "bias")
    )
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_close(model(x), F.linear(x, weight, bias), **DOUBLE)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8)])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(8, 6), lambda: nn.Linear(8, 6, False), lambda: Conv1D(6, 8)],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_an_output_may_be_written_to(make, shape, way, is_compiled):
    torch.manual_seed(0)
    model = adapted(make().double())
    x = torch.randn(shape, dtype=torch.float64)
    values = [*model.base_model.model[0].irdelta_values["default"].values()]

    def written(x):
        return model(x).relu_()

    if is_compiled:
        torch.compiler.reset()
        written = torch.compile(written, backend="eager", fullgraph=True)
    with forced(way=way):
        expected = torch.autograd.grad(model(x).relu().sin().sum(), values)
        found = torch.autograd.grad(written(x).sin().sum(), values)
    assert_close(found, expected, **DOUBLE)


def test_backward_stops_below_the_lowest_entry():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    config = IRDConfig(density=1.0, method="random", target_modules=["1"])
    model = get_peft_model(model, config)
    seen = []
    for number, module in enumerate(model.base_model.model):
        module.register_forward_hook(
            lambda *args, n=number: seen.append((n, args[2].requires_grad))
        )
    model(torch.randn(2, 4))
    assert seen == [(0, False), (1, True), (2, True)]


@st.composite
def tables(draw):
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    chosen = sorted(draw(st.sets(st.integers(0, rows * width - 1))))
    batch = draw(st.sampled_from([(), (1,), (4,), (2, 3), (0,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = torch.randint(rows, batch, generator=generator)
    table = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(len(chosen), generator=generator, dtype=torch.float64)
    indices = torch.tensor(chosen, dtype=torch.int32)
    padding = draw(st.sampled_from([None, *range(rows)]))
    delta = SparseDelta(indices, values.requires_grad_(), table.shape)
    return table, ids, delta, padding


@given(tables())
def test_an_embedding_is_the_dense_one(problem):
    table, ids, delta, padding = problem
    merged = table + delta.to_dense(table.dtype)
    expected = F.embedding(ids, merged, padding)
    found = plus_rows(F.embedding(ids, table, padding), ids, delta, padding)
    assert_close(found, expected, **DOUBLE)
    assert torch.equal(found, F.embedding(ids, merged.detach(), padding))
    mine, theirs = (gradients(y, [delta.values])[0] for y in (found, expected))
    assert_close(mine, theirs, **DOUBLE)


def test_the_cheapest_way_follows_the_costs(monkeypatch):
    cpu = torch.device("cpu")
    prices = costs.Costs(sampled=8.0, moved=100.0)
    monkeypatch.setattr(costs, "calibrated", lambda *_: prices)
    dear = 8 * 2000 + 100 * 2000  # 2000 entries of a whole matrix
    assert dear < 1000 * 1000
    assert costs.cheapest((1000, 1000), 2000, cpu, torch.float32) == "sampled"
    assert costs.cheapest((200, 300), 2000, cpu, torch.float32) == "block"
    assert costs.cheapest((1000, 1000), 200_000, cpu, torch.float32) == "block"


def test_what_is_forced_must_exist():
    with pytest.raises(ValueError, match=r"`way` must be one of in_weight, separate"):
        forced(way="sideways").__enter__()
    with pytest.raises(ValueError, match=r"`gradient` must be one of block, sampled"):
        forced(gradient="guess").__enter__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [nn.Linear, Conv1D])
def test_one_operator_takes_what_is_not_contiguous(make, dtype):
    torch.manual_seed(0)
    is_transposed = make is Conv1D
    base = make(5, 6) if is_transposed else make(6, 5)
    layer = adapted(base).to(dtype).base_model.model[0]
    base.requires_grad_(False)
    delta = layer._delta("default", "weight")
    exact = base.weight.double() + delta.to_dense(torch.float64).detach()
    exact = exact.t() if is_transposed else exact
    x = torch.randn(4, 6, 3, 2, dtype=dtype).transpose(1, 3)  # [4, 2, 3, 6]
    for each in (x, x.expand(2, *x.shape), x[:, :0], x[0, 0, 0]):
        leaf = each.detach().requires_grad_()
        found = linear_and_product(leaf, base.weight, base.bias, delta, is_transposed)
        expected = F.linear(each.double(), exact, base.bias.double())
        assert_close(found.double(), expected, **TOL[dtype])
        (for_x,) = torch.autograd.grad(found.sum(), leaf)
        ones = torch.ones_like(expected) @ exact
        assert_close(for_x.double(), ones, **TOL[dtype])


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("chosen", [[1, 5, 6], [1, 19]])  # in most columns, in few
def test_the_operators_pass_the_checks_of_torch(chosen, is_held):
    torch.manual_seed(0)
    indices = torch.tensor(chosen, dtype=torch.int32)
    x = torch.randn(2, 6, requires_grad=True)
    weight, bias = torch.randn(4, 6), torch.randn(4, requires_grad=True)
    values = torch.randn(len(chosen), requires_grad=True)
    ops = torch.ops.peft_ird
    support = support_of(indices, (4, 6), is_held=is_held)
    assert (support.held is not None) == is_held
    delta = values, indices, support.sizes, support.held
    torch.library.opcheck(ops.linear.default, (x, weight, bias, *delta, "block", False))
    y = torch.randn(2, 4, requires_grad=True)
    torch.library.opcheck(ops.plus_product.default, (y, x, *delta, "sampled", False))
    torch.library.opcheck(
        ops.linear_and_product.default,
        (x, weight, bias.detach(), *delta, "block", False),
    )
    torch.library.opcheck(ops.used.default, (indices, 1, support.sizes))


def test_the_embedding_operator_passes_the_checks_of_torch():
    torch.manual_seed(0)
    indices = torch.tensor([1, 5, 6], dtype=torch.int32)
    values = torch.randn(3, requires_grad=True)
    ops = torch.ops.peft_ird
    ids = torch.tensor([0, 2])
    rows = torch.randn(2, 4, requires_grad=True)
    torch.library.opcheck(ops.plus_rows.default, (rows, ids, values, indices, -1))


@pytest.mark.parametrize("density", [0.02, 0.7])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_an_entry_takes_twenty_bytes_with_adam(is_loaded, density, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Embedding(50, 8), nn.LayerNorm(8))
    config = IRDConfig(density=density, method="random")
    model = get_peft_model(copy.deepcopy(base), config)
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained)
    layers = [m for m in model.modules() if isinstance(m, IRDLayer)]
    for layer in layers:
        ids = torch.arange(50)
        x = ids if layer.in_features == 50 else torch.randn(2, layer.in_features)
        layer(x).sum().backward()
    optimizer.step()
    state = [b for n, b in model.named_buffers() if "irdelta" in n]
    for layer in layers:
        for support in layer._supports["default"].values():
            state += [] if support.held is None else [support.held]
    state += [*trained, *(p.grad for p in trained)]
    state += [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    entries = sum(p.numel() for p in trained)
    assert sum(t.nbytes for t in state) == 20 * entries


@given(problems(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_product_of_low_values_is_computed_in_float32(problem, dtype):
    values = problem.delta.values.detach().to(dtype).requires_grad_()
    delta = replace(problem.delta, values=values)
    x = problem.x.detach().float().requires_grad_()
    exact = replace(problem, x=x.detach().double())
    zero = torch.zeros(*x.shape[:-1], problem.dense(problem.delta.values).shape[-1])
    found = plus_product(zero, x, delta, problem.is_transposed)
    nothing = replace(exact, weight=torch.zeros_like(exact.weight), bias=None)
    expected = nothing.dense(values.detach().double())
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, **TOL[torch.float32])
    (mine,) = torch.autograd.grad(found.sum(), x)
    ones = torch.ones_like(expected)
    dense = delta.to_dense(torch.float64).detach()
    dense = dense.t() if problem.is_transposed else dense
    assert_close(mine.double(), ones @ dense, **TOL[torch.float32])


def test_used_rows_come_in_multiples_where_there_are_enough():
    indices = torch.arange(0, 30 * 64, 64)  # column 0 of 30 rows of 100
    support = support_of(indices, (100, 64), multiple=8)
    rows, columns, places = support.layout(indices)
    assert support.block == (32, 8)
    assert rows.tolist() == [*range(30), 30, 31]
    assert columns.tolist() == [*range(8)]
    assert places.tolist() == [8 * row for row in range(30)]
