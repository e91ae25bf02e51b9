"""Models whose batches are not, or not always, what their samples are alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BatchEncoding, MixtralConfig, MixtralForCausalLM

from peft_ird import Calibration, IRDConfig
from peft_ird.adapter.targets import find_candidates
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed
from peft_ird.selection.gradients.limits import Limits
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.gradients.singles import Singles
from tests.exactness import Loss, check_model, compute, expected_of, own_loss
from tests.oracles import TOL

WIDTH = 6
Samples = list[dict[str, Tensor]]


def entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"])


def samples_of(*shape: int, count: int = 12, odd: int | None = None) -> Samples:
    """Return batches of one; an odd one is above 1.5 somewhere, others nowhere."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in range(count):
        x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        x = x.clamp(-1, 1)
        if n == odd:
            x[0, 0] = 2.0
        found.append({"input_ids": x, "labels": torch.tensor([n % 2])})
    return found


class Sometimes(nn.Module):
    """Uses its matrix in a second way in batches with an odd sample."""

    def __init__(self, other: Callable[["Sometimes", Tensor], Tensor]) -> None:
        super().__init__()
        self.matrix = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.matrix(x)
        is_odd = (x[:, :1, :1] > 1.5).to(x.dtype)
        if bool(is_odd.any()):
            hidden = hidden + self.other(self, x) * is_odd
        return self.out(hidden.mean(1))


def written(model: Sometimes, x: Tensor) -> Tensor:
    y = x.new_zeros(len(x), WIDTH, WIDTH)
    y[:] = model.matrix.weight
    return y


OTHER_USES: dict[str, Callable[[Sometimes, Tensor], Tensor]] = {
    "written": written,
    "as it is": lambda m, x: m.matrix.weight.expand(len(x), WIDTH, WIDTH),
    "transposed": lambda m, x: F.linear(x, m.matrix.weight.t(), m.matrix.bias),
    "added": lambda m, x: torch.addmm(m.matrix.bias, x[:, 0], m.matrix.weight)[:, None],
    "with itself": lambda m, x: x @ (m.matrix.weight @ m.matrix.weight),
    "normed": lambda m, _: F.layer_norm(m.matrix.weight, (WIDTH,), m.matrix.bias),
}


class Ordered(nn.Module):
    """Computes with its samples in another order, and puts them back."""

    def __init__(self, pick: Callable[[Tensor, list[int]], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort().tolist()
        back = [order.index(i) for i in range(len(order))]
        hidden = self.pick(self.first(x).tanh(), order)
        return self.out(self.pick(self.middle(hidden).tanh(), back))


ORDERS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "a list": lambda x, order: x[order],
    "an array": lambda x, order: x[torch.tensor(order).numpy()],
    "stacked": lambda x, order: torch.stack([x[i] for i in order]),
    "joined": lambda x, order: torch.cat([x[i : i + 1] for i in order]),
}


class Steps(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.between(self.first(x)))


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda x: x.index_select(1, torch.arange(WIDTH)),
    "columns by name": lambda x: torch.index_select(
        input=x, dim=-1, index=torch.arange(WIDTH)
    ),
    "transposed by name": lambda x: torch.transpose(
        input=torch.transpose(input=x, dim0=0, dim1=1), dim0=0, dim1=1
    ),
}


class Recurrent(nn.Module):
    """Most of its parameters are taken one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(WIDTH, WIDTH, num_layers=3, batch_first=True)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)[0].mean(1))


def made(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model.double()


class TestWhatBatchesDoNotShow:
    @pytest.mark.parametrize("use", OTHER_USES)
    def test_a_use_that_no_trial_saw_is_not_lost(self, use):
        model = made(Sometimes(OTHER_USES[use]))
        samples = samples_of(WIDTH, WIDTH, odd=5)
        check_model(model, samples, entropy, batch_size=4)

    @pytest.mark.parametrize("way", ORDERS)
    def test_samples_in_another_order_are_told_apart(self, way):
        model, samples = made(Ordered(ORDERS[way])), samples_of(WIDTH)
        samples[0]["input_ids"][0, 0], samples[-1]["input_ids"][0, 0] = (
            -3.0,
            3.0,
        )  # sorted in the trial
        check_model(model, samples, entropy, batch_size=4)

    @pytest.mark.parametrize("between", BETWEEN)
    def test_columns_may_be_picked(self, between):
        model, samples = made(Steps(BETWEEN[between])), samples_of(WIDTH)
        check_model(model, samples, entropy, alone=set())

    def test_samples_without_a_gradient_are_no_trial(self):
        """A mean made by hand over a batch is not that of its samples."""

        def hinge(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return (
                (batch["margin"] - model(batch["input_ids"])[:, 0]).clamp(min=0).mean()
            )

        model, samples = made(Steps()), samples_of(WIDTH)
        for n, sample in enumerate(samples):
            shift = -1.0 if n in {0, 3, 11} else 1.0 + n
            sample["margin"] = model(sample["input_ids"])[:, 0].detach() + shift
        check_model(model, samples, hinge)

    def test_no_sample_has_a_gradient(self):
        model, samples = made(Steps()), samples_of(WIDTH)

        def flat(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return (model(batch["input_ids"])[:, 0] * 0).mean()

        check_model(model, samples, flat)

    def test_a_faint_mixture_is_seen_in_float32(self):
        """Norms hardly show an error at a right angle to the gradient."""
        config = MixtralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
            output_router_logits=True, router_aux_loss_coef=1e-3,
        )  # fmt: skip
        torch.manual_seed(0)
        ids = torch.randint(3, 40, (8, 1, 24))
        samples = [{"input_ids": each, "labels": each} for each in ids]
        model = MixtralForCausalLM(config).eval()
        model.config._experts_implementation = "eager"
        check_in_float32(model, samples, own_loss)

    def test_faint_parameters_are_compared_as_well(self):
        class Faint(Steps):
            def forward(self, x: Tensor) -> Tensor:
                across = self.first(x.transpose(0, 1)).tanh()
                return self.out(x + 1e-5 * across.transpose(0, 1)).mean(1)

        model = made(Faint()).float()
        check_in_float32(model, samples_of(24, WIDTH), entropy)


class TestLosses:
    def test_weights_of_single_samples_stay_theirs(self):
        def weighted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            target = F.one_hot(batch["labels"], 2).to(batch["input_ids"].dtype)
            scores = model(batch["input_ids"])
            return F.binary_cross_entropy_with_logits(scores, target, batch["weight"])

        model, samples = made(Steps()), samples_of(WIDTH)
        for n, sample in enumerate(samples):
            sample["weight"] = torch.tensor([[1.0 + n]]).double()
        check_model(model, samples, weighted, alone=set())

    def test_a_class_without_weight_counts_as_no_label(self):
        weight = torch.tensor([1.0, 0.0]).double()

        def weighted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch["input_ids"]), batch["labels"], weight)

        model, samples = made(Steps()), samples_of(WIDTH)
        pool = pool_of(model)
        found = compute(model, Calibration(samples, loss=weighted), pool)
        one = [s for s in samples if s["labels"].item() == 0]
        expected = expected_of(model, one, pool, weighted)
        share = len(one) / len(samples)
        assert_close(found.fisher, expected.fisher * share, **TOL[torch.float64])
        assert_close(found.scores[::2], expected.scores, **TOL[torch.float64])
        assert not found.scores[1::2].any()

    def test_a_bad_sample_is_named_in_the_warm_up(self):
        model, samples = made(Steps()), samples_of(WIDTH)
        samples[9]["input_ids"][0, 0] = torch.nan
        with borrowed(model):
            estimator = FisherEstimator(
                model, pool_of(model), Calibration(samples, loss=entropy)
            )
            head = estimator.head_warmed_up([*model.out.parameters()], (0, 1), 1, 0.1)
            with pytest.raises(ValueError, match="calibration sample 9"), head:
                pass


class TestWhatIsHeld:
    def test_a_view_of_much_is_kept_as_a_copy(self):
        class Shown(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(WIDTH, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(x.tanh()[:, 0])

        model, samples = made(Shown()), samples_of(64, WIDTH)
        positions = tuple(range(len(samples)))
        with borrowed(model):
            estimator = FisherEstimator(
                model, pool_of(model), Calibration(samples, loss=entropy)
            )
            estimator.remember(positions)
            kept = [
                tensor
                for batch in estimator._engine.kept.batches(positions)
                for gradients in batch.gradients.values()
                for tensor in gradients.tensors()
            ]
            outcome = estimator._engine.prepare(positions)
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        counted = 64 * WIDTH * outcome.token_bytes + outcome.sample_bytes
        assert held <= counted * len(samples) < 64 * WIDTH * 8

    def test_a_batch_is_measured_without_the_weights(self):
        """Those are saved for the backward pass, too, but are there anyhow."""

        class Wide(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.out = nn.Linear(WIDTH, 999), nn.Linear(999, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(self.first(x).tanh()).mean(1)

        model, by_token = made(Wide()), []
        for tokens in (1, 30):
            data = Calibration(samples_of(tokens, WIDTH, count=3), loss=entropy)
            with borrowed(model):
                engine = FisherEstimator(model, pool_of(model), data)._engine
                by_token.append(engine.prepare((0, 1, 2)).activation_bytes)
        assert by_token[0] == pytest.approx(by_token[1], rel=0.1)

    def test_gradients_that_go_alone_are_formed_in_groups(self, monkeypatch):
        model, at_once = made(Recurrent()), []
        gradients = Singles.gradients

        def noting(self: Singles, position: int, parts: Sequence[int]) -> Any:
            at_once.append(sum(self.pool.sizes[part] for part in parts))
            return gradients(self, position, parts)

        monkeypatch.setattr(Singles, "gradients", noting)
        data, pool = Calibration(samples_of(4, WIDTH), loss=entropy), pool_of(model)
        limit = 4 * max(pool.sizes) * pool.dtype.itemsize
        with borrowed(model):
            estimator = FisherEstimator(model, pool, data, memory_limit=limit)
            estimator.sample_scores(range(12), None)
        assert max(at_once) <= 2 * max(pool.sizes) < len(pool)

    def test_a_limit_lets_any_number_of_processes_keep_as_much(self):
        """Else other samples would share batches, and sums would round otherwise."""
        pool = pool_of(made(Steps()))
        kept = set()
        for size in (1, 2, 4):
            ranks = Ranks()
            ranks.size = size
            kept.add(Limits.of(pool, None, 40 * len(pool), ranks).cache_bytes)
        assert len(kept) == 1

    def test_processes_keep_as_much_as_the_smallest_can(self, monkeypatch):
        ranks = Ranks()
        monkeypatch.setattr(ranks, "gather", lambda mine: [mine, 40_000])
        limits = Limits.of(pool_of(made(Steps())), None, None, ranks)
        assert limits.cache_bytes == 10_000


def test_what_a_tokenizer_made_goes_to_the_models_device():
    model = made(Steps())
    pool = pool_of(model)
    singles = Singles(model.to("meta"), pool, Calibration([]), "empirical", 0)
    given = BatchEncoding({"input_ids": torch.ones(1, 2)})
    moved = singles._moved(given)
    assert isinstance(moved, BatchEncoding)
    assert moved.input_ids.is_meta
    assert not given.input_ids.is_meta


class TestTheModelComesBack:
    def test_buffers_may_be_sparse(self):
        class Graph(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(WIDTH, 2)
                edges = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
                self.register_buffer("edges", edges.to_sparse())

            def forward(self, x: Tensor) -> Tensor:
                return torch.sparse.mm(self.edges, self.out(x).T).T

        check_model(made(Graph()), samples_of(WIDTH), entropy, alone=set())

    def test_what_a_forward_writes_is_undone(self):
        class Writing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(12, WIDTH, max_norm=0.5)
                self.out = nn.Linear(WIDTH, 2)
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.count += 1
                self.seen = self.table(x)
                return self.out(self.seen.mean(1))

        model = made(Writing())
        before = {name: t.clone() for name, t in model.state_dict().items()}
        samples = [
            {"input_ids": torch.arange(n, n + 4)[None], "labels": torch.tensor([n % 2])}
            for n in range(6)
        ]
        compute(model, Calibration(samples, loss=entropy), pool_of(model))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not hasattr(model, "seen")


def pool_of(model: nn.Module) -> Any:
    return find_candidates(model, IRDConfig(density=0.1))


def check_in_float32(model: nn.Module, samples: Samples, loss: Loss) -> None:
    """Compare the Fisher information of each parameter with the oracle's."""
    singles = [
        {k: v.float() if v.is_floating_point() else v for k, v in sample.items()}
        for sample in samples
    ]
    pool = pool_of(model)
    found = compute(model, Calibration(singles, loss=loss), pool)
    expected = expected_of(model, samples, pool, loss)
    pairs = (each.fisher.split(pool.sizes) for each in (found, expected))
    for mine, exact in zip(*pairs, strict=True):
        assert (mine - exact).norm() <= 1e-5 * exact.norm()
