"""Gradients of single samples from batches, against one backward pass per sample."""

import contextlib
import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_ird import Calibration, IRDConfig, Selection, select_parameters
from peft_ird.adapter.targets import find_candidates
from peft_ird.selection import fisher
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients import trial
from peft_ird.selection.gradients.batching import Sample, plan
from peft_ird.selection.gradients.lending import borrowed
from peft_ird.selection.gradients.limits import Limits
from peft_ird.selection.pool import Pool
from tests.conftest import as_batch, bert_config, make_model, make_samples, task_type
from tests.exactness import (
    Loss,
    check,
    check_model,
    compute,
    expected_of,
    names_of,
)
from tests.oracles import TOL

WIDTH, CLASSES, VOCABULARY = 6, 3, 11


def flat_of(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


# From hidden states ``[n, t, d]`` and a mask ``[n, t]`` to the rows that it picks.
PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, mask: flat_of(x)[mask.flatten().nonzero().flatten()],
    "mask": lambda x, mask: x[mask],
    "joined": lambda x, mask: torch.cat([a[b] for a, b in zip(x, mask, strict=True)]),
    "cut off": lambda x, mask: torch.cat(
        [a[: int(b.sum())] for a, b in zip(x, mask, strict=True)]
    ),
    "by name": lambda x, mask: flat_of(x).index_select(
        dim=0, index=mask.flatten().nonzero().flatten()
    ),
    "led by None": lambda x, mask: flat_of(x)[
        None, mask.flatten().nonzero().flatten()
    ].reshape(-1, x.shape[-1]),
    "gathered": lambda x, mask: flat_of(x).gather(
        0, mask.flatten().nonzero().expand(-1, x.shape[-1])
    ),
    "taken": lambda x, mask: torch.take_along_dim(
        flat_of(x), mask.flatten().nonzero().expand(-1, x.shape[-1]), dim=0
    ),
    "looked up": lambda x, mask: F.embedding(
        mask.flatten().nonzero().flatten(), flat_of(x)
    ),
}


# What may happen to rows before they are computed with.
WAYS_THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "chunks": lambda x: torch.cat(x.chunk(2, -1), -1),
    "halves": lambda x: torch.cat(x.split(WIDTH // 2, dim=-1), dim=-1),
    "heads": lambda x: x.view(-1, 2, WIDTH // 2).flatten(1).tanh(),
    "columns": lambda x: torch.stack(x.unbind(-1), -1),
    "one more": lambda x: torch.cat([x, x[:0]]),
    "repeated": lambda x: x.repeat_interleave(2, 0)[::2],
}


def hf_samples(name: str, count: int = 12) -> list[dict[str, Tensor]]:
    batches = [as_batch(sample) for sample in make_samples(name, count)]
    if name == "bert-regression":
        batches = [{**b, "labels": b["labels"].double()} for b in batches]
    return batches


def settings_of(name: str) -> dict[str, str]:
    return {"task_type": task_type(name)}


def flat(selection: Selection) -> list[tuple[str, str, list[int]]]:
    return [
        (module, name, indices.tolist())
        for module, tree in selection.indices.items()
        for name, indices in tree.items()
    ]


TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
    "pad_token_id": 0,
}  # fmt: skip
SPEECH = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "pad_token_id": 0, "decoder_start_token_id": 1,
    "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
UNUSED = ["pooler.dense", "embed_positions"]  # no gradient, or only of some rows


def some_ids(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 40, shape, generator=generator)


def heard(n: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    sound = torch.randn(1, 8, 16, generator=generator, dtype=torch.float64)
    return {"input_features": sound, "labels": some_ids(n, 1, length)}


def translated(n: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": some_ids(n, 1, length), "labels": some_ids(n + 9, 1, length)}


def classified(n: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": some_ids(n, 1, length), "labels": torch.tensor([n % 2])}


def chosen(n: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": some_ids(n, 1, 3, length), "labels": torch.tensor([n % 3])}


# name -> (model, sample of a number and length, what goes alone in it)
TABLES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "whisper": (
        lambda: WhisperForConditionalGeneration(
            WhisperConfig(
                **SPEECH, num_mel_bins=8, max_source_positions=8,
                max_target_positions=32,
            )
        ),
        heard,
        "",
    ),
    "m2m100": (
        lambda: M2M100ForConditionalGeneration(M2M100Config(**SPEECH)), translated, "",
    ),
    "deberta": (
        lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**TEXT)),
        classified,
        "",
    ),
    "choices": (lambda: BertForMultipleChoice(BertConfig(**TEXT)), chosen, ""),
}  # fmt: skip


class TestTransformers:
    @pytest.mark.parametrize("keep", [False, True])
    def test_every_parameter_is_exact_in_batches(self, any_name, keep):
        model = make_model(any_name).double()
        # These biases belong to no sample: all samples of a batch share one.
        shared = {n for n, _ in model.named_parameters() if "relative_attention" in n}
        assert len(shared) == (2 if any_name == "t5" else 0)
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(any_name)))
        batches = hf_samples(any_name)
        found = compute(model, Calibration(batches), pool, keep)
        check(found, expected_of(model, batches, pool), alone=shared)

    @pytest.mark.parametrize("kind", TABLES)
    @pytest.mark.parametrize("lengths", [(4, 4, 4, 4, 4, 4), (6, 4, 5, 6, 4, 3)])
    def test_rows_of_a_table_are_no_rows_of_a_batch(self, kind, lengths):
        """Positions that are looked up, and logits of all samples that have labels."""
        make, sample, ending = TABLES[kind]
        model = make().double().eval()
        samples = [sample(n, length) for n, length in enumerate(lengths)]
        everything = {name for name, _ in model.named_parameters()}
        alone = {name for name in everything if ending and ending in name}
        pool = find_candidates(model, IRDConfig(density=0.1, exclude_modules=UNUSED))
        data = [{name: field[0] for name, field in s.items()} for s in samples]
        found = compute(model, Calibration(data), pool)
        check(found, expected_of(model, samples, pool), alone)

    def test_any_choice_of_parameters_is_exact(self, name):
        model = make_model(name).double()
        whole = find_candidates(model, IRDConfig(density=0.1, **settings_of(name)))
        batches = hf_samples(name, 6)
        for start in range(3):
            chosen = range(start, len(whole.sizes), 3)
            pool = Pool((*whole.names[i], whole.parameters[i]) for i in chosen)
            found = compute(model, Calibration(batches), pool)
            check(found, expected_of(model, batches, pool), alone=set())

    @pytest.mark.parametrize("fisher_type", ["empirical", "sampled"])
    def test_the_batch_size_does_not_matter(self, name, fisher_type):
        model = make_model(name).double()
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(name)))
        one, *others = (
            compute(
                model,
                Calibration(make_samples(name, 13), batch_size=size),
                pool,
                fisher_type=fisher_type,
            )
            for size in (1, 3, 8, None)
        )
        for other in others:
            check(other, one, alone=set())

    @pytest.mark.parametrize("method", ["ird", "reverse_ird", "gradient"])
    def test_the_batch_size_does_not_change_the_selection(self, name, method):
        model = make_model(name).double()
        settings = {"num_samples": 12, "density": 0.02, "method": method}
        config = IRDConfig(**settings, **settings_of(name))
        one, *others = (
            select_parameters(
                model, config, Calibration(make_samples(name), batch_size=size)
            )
            for size in (1, 3, 8, None)
        )
        for other in others:
            assert flat(other) == flat(one)
            assert other.samples == one.samples

    @pytest.mark.parametrize("with_mask", [True, False])
    def test_padding_by_the_user_changes_nothing(self, name, with_mask):
        model = make_model(name).double()
        ragged = hf_samples(name)
        padded = [padded_to(12, sample) for sample in ragged]
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(name)))
        expected = expected_of(model, ragged, pool)
        check(compute(model, Calibration(padded), pool), expected, alone=set())
        mixed = [*ragged[:6], *padded[6:]]
        if not with_mask:
            mixed[:6] = [without_mask(sample) for sample in ragged[:6]]
        check(compute(model, Calibration(mixed), pool), expected, alone=set())

    def test_samples_without_a_mask_are_exact(self, name):
        samples = [without_mask(sample) for sample in hf_samples(name)]
        model = make_model(name).double()
        check_model(model, samples, alone=set(), **settings_of(name))

    @pytest.mark.parametrize("lengths", [(4, 4, 6, 10, 10), (4, 5, 6, 10, 10)])
    def test_a_softmax_over_padding_is_exact(self, lengths):
        generator = torch.Generator().manual_seed(0)
        samples = []
        for length in lengths:
            ids = torch.randint(3, 40, (1, length), generator=generator)
            sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for name in ("start_positions", "end_positions"):
                sample[name] = torch.randint(length, (1,), generator=generator)
            samples.append(padded_to(10, sample))
        model = make_model("bert-questions").double()
        check_model(model, samples, **settings_of("bert-questions"))

    @pytest.mark.parametrize("batch_size", [1, None])
    @pytest.mark.parametrize("name", ["bert", "t5"])
    def test_a_collator_that_draws_anew_is_asked_once(self, name, batch_size):
        """Then a sample is the same cut, padded and alone."""
        samples, made = make_samples(name), []
        generator = torch.Generator().manual_seed(0)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = padded_to(12, as_batch(rows[0]))
            is_masked = torch.rand(1, 12, generator=generator) < 0.3
            batch["input_ids"] = batch["input_ids"].masked_fill(is_masked, 1)
            made.append((samples.index(rows[0]), batch))
            return batch

        model = make_model(name).double()
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(name)))
        found = compute(model, Calibration(samples, collate, None, batch_size), pool)
        positions, batches = zip(*sorted(made, key=itemgetter(0)), strict=True)
        assert positions == tuple(range(12))
        check(found, expected_of(model, batches, pool))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_the_kind_of_attention_does_not_matter(self, name, attention):
        model = make_model(name).double()
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(name)))
        batches = hf_samples(name)
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        found = compute(model, Calibration(batches), pool)
        check(found, expected_of(model, batches, pool), alone=set())
        other = {"eager": "sdpa", "sdpa": "eager"}[attention]
        model.set_attn_implementation(other)
        expected = expected_of(model, batches, pool).fisher
        assert_close(found.fisher, expected, **TOL[torch.float32])  # LLaMA's softmax

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_dropout_and_checkpoints_of_training_are_off(self, reentrant):
        dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
        model = BertForSequenceClassification(bert_config(**dropout)).double()
        settings = settings_of("bert")
        pool = find_candidates(model, IRDConfig(density=0.1, **settings))
        batches = hf_samples("bert")
        expected = expected_of(model, batches, pool)
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable  # transformers < 5.23
        enable({"use_reentrant": reentrant})
        model.train()
        check(compute(model, Calibration(batches), pool), expected, alone=set())
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("batch_size", [1, None])
    def test_nothing_flows_back_below_the_lowest_targeted_layer(self, name, batch_size):
        model = make_model(name).double()
        prefixes = {"bert": "bert.encoder.layer", "gpt2": "transformer.h"}
        layers = prefixes.get(name, "model.layers")
        needs_grad = {0: [], 1: []}
        handles = []
        for layer, seen in needs_grad.items():
            hook = note_grad(seen)
            module = model.get_submodule(f"{layers}.{layer}")
            handles.append(module.register_forward_hook(hook))
        config = IRDConfig(
            density=0.1, num_samples=12, layers_to_transform=[1], **settings_of(name)
        )
        calibration = Calibration(make_samples(name), batch_size=batch_size)
        selection = select_parameters(model, config, calibration)
        for handle in handles:
            handle.remove()
        assert all(".1." in f"{module}." for module in selection.indices)
        assert any(needs_grad[1])
        assert len(needs_grad[0]) == len(needs_grad[1])
        assert not any(needs_grad[0])


def note_grad(seen: list[bool]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.requires_grad)

    return hook


def padded_to(width: int, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    fill = {"input_ids": 5, "attention_mask": 0, "labels": -100}
    return {
        name: F.pad(value, (0, width - value.shape[1]), value=fill[name])
        if value.ndim > 1
        else value
        for name, value in sample.items()
    }


def without_mask(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v for name, v in sample.items() if name != "attention_mask"}


class Lookup(nn.Module):
    """Passes its padding on as it is, counted from the end if negative."""

    def __init__(self, rows: int, columns: int, padding_idx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.padding_idx)


class LlamaNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt())


class GemmaNorm(LlamaNorm):
    """Multiplies with one more than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        normed = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return normed * (1.0 + self.weight.to(x.dtype))


class CohereNorm(LlamaNorm):
    """Multiplies with its weight in the type of the computation."""

    def forward(self, x: Tensor) -> Tensor:
        normed = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return self.weight.to(torch.float64) * normed


class Overwritten(nn.Linear):
    """Writes to its output, as Longformer does."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y /= 2
        return y


class Table(nn.Module):
    """Adds a parameter that is one for each position."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1])[None])


class Scales(nn.Module):
    """Multiplies by parameters of several shapes, from either side."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor(1.3))
        self.flat = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.wide = nn.Parameter(torch.rand(1, 1, WIDTH) + 0.5)
        self.shift = nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.mul(self.one * x * self.flat, self.wide)
        return torch.add(x, self.shift).mul(self.one)


class Grid(nn.Module):
    """Adds a little of a grid, which is no batch though its sides could be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, WIDTH))
        self.grid = torch.rand(12, 5, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-5 * (self.grid @ self.weight).mean((0, 1))


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.module(x).tanh())


class Partners(nn.Module):
    """Two linear layers with one weight and two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


class Unused(nn.Module):
    """Uses its weight a second time in a way that sends nothing back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.linear(x)
        return self.linear(x) + shift


class Channels(nn.Module):
    """Gives a module its input with channels first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.transpose(1, 2)).transpose(1, 2)


class First(nn.Module):
    """Gives a module its input with tokens first and samples second."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.transpose(0, 1)).tanh().transpose(0, 1)


class Centred(nn.Module):
    """Mixes the samples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) / 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x, need_weights=False)[0]


class ByHand(nn.Module):
    """A linear layer written as a product."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight) + self.bias


class Image(nn.Module):
    """Gives a convolution its input as an image of one channel, or as a film."""

    def __init__(self, module: nn.Module, sides: int = 2) -> None:
        super().__init__()
        self.module, self.sides = module, sides

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], 1, *(1,) * (self.sides - 2), *x.shape[1:])
        return self.module(x.view(shape)).flatten(1, -3).mean(1)


class Tokens(nn.Module):
    """Puts a token, or several, before those of each sample."""

    def __init__(self, *shape: int, spread: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.token, self.spread = nn.Parameter(torch.randn(*shape)), spread

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.spread(self.token, len(x)), x], 1).cumsum(1).tanh()


class HalfKnown(nn.Module):
    """Uses its weight in a linear layer, and in a way that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.einsum("nto,oi->nti", x, self.linear.weight)


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.center).tanh()


class Scaled(nn.Module):
    """A linear layer whose weight is computed of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.linear.weight, self.linear.bias)


class Either(nn.Module):
    """Has a layer for short samples and one for long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return (self.long if x.shape[1] > 3 else self.short)(x)


class Checkpointed(nn.Module):
    """Computes a part of itself again in the backward pass, in any mode."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), LlamaNorm())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


# name -> (module, its parameters that need one sample at a time)
BODIES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "linear": (linear, set()),
    "linear without bias": (lambda: nn.Linear(WIDTH, WIDTH, bias=False), set()),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), set()),
    "layer norm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), set()),
    "rms norm": (lambda: nn.RMSNorm(WIDTH), set()),
    "llama's norm": (LlamaNorm, set()),
    "gemma's norm": (GemmaNorm, set()),
    "gemma's norm twice": (lambda: Twice(GemmaNorm()), set()),
    "cohere's norm": (CohereNorm, set()),
    "overwritten output": (lambda: Overwritten(WIDTH, WIDTH), set()),
    "table of positions": (lambda: Table(1, 4, WIDTH), set()),
    "flat table of positions": (lambda: Table(4, WIDTH), set()),
    "embedding of positions": (Positions, set()),
    "scales": (Scales, set()),
    "faint grid": (Grid, {"weight"}),
    "linear twice": (lambda: Twice(linear()), set()),
    "norm twice": (lambda: Twice(nn.LayerNorm(WIDTH)), set()),
    "llama's norm twice": (lambda: Twice(LlamaNorm()), set()),
    "shared weight": (Partners, set()),
    "use without gradient": (Unused, set()),
    "convolution": (lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)), set()),
    "convolution in steps": (
        lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=2, stride=2)),
        set(),
    ),
    "convolution in groups": (
        lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
        set(),
    ),
    "convolution of each channel": (
        lambda: Channels(
            nn.Conv1d(WIDTH, WIDTH, 2, padding="valid", groups=WIDTH, bias=False)
        ),
        set(),
    ),
    "convolution twice": (
        lambda: Twice(Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))),
        set(),
    ),
    "convolution of an image": (
        lambda: Image(nn.Conv2d(1, 3, (3, 5), padding=(1, 2))),
        set(),
    ),
    "transposed convolution": (
        lambda: Image(nn.ConvTranspose2d(1, 1, 1)),
        {"module.weight", "module.bias"},
    ),
    "convolution of a film": (
        lambda: Image(nn.Conv3d(1, 2, (1, 3, 3), padding=(1, 1, 1)), 3),
        set(),
    ),
    "convolution in its own size": (
        lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding="same")),
        {"module.weight", "module.bias"},
    ),
    "dilated convolution": (
        lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2)),
        {"module.weight", "module.bias"},
    ),
    "group norm": (
        lambda: Channels(nn.GroupNorm(2, WIDTH)),
        {"module.weight", "module.bias"},
    ),
    "norm of two dimensions": (
        lambda: nn.LayerNorm((4, WIDTH)),
        {"weight", "bias"},
    ),
    "lstm": (
        Recurrent,
        {f"lstm.{kind}_{of}_l0" for kind in ("weight", "bias") for of in ("ih", "hh")},
    ),
    "attention": (
        Attention,
        {
            f"heads.{name}"
            for name in (
                "in_proj_weight",
                "in_proj_bias",
                "out_proj.weight",
                "out_proj.bias",
            )
        },
    ),
    "product by hand": (lambda: ByHand(lambda x, w: x @ w.t()), set()),
    "product with T": (lambda: ByHand(lambda x, w: torch.matmul(x, w.T)), set()),
    "product with mT": (lambda: ByHand(lambda x, w: x.matmul(w.mT)), set()),
    "product with transpose": (
        lambda: ByHand(lambda x, w: x @ w.transpose(-1, -2)),
        set(),
    ),
    "product the other way": (lambda: ByHand(lambda x, w: x @ w), set()),
    "product from the left": (
        lambda: ByHand(lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2)),
        {"weight"},
    ),
    "expanded token": (
        lambda: Tokens(1, 1, WIDTH, spread=lambda p, n: p.expand(n, -1, -1)),
        set(),
    ),
    "expanded tokens": (
        lambda: Tokens(3, WIDTH, spread=lambda p, n: p.expand(n, -1, -1)),
        set(),
    ),
    "expanded vector": (
        lambda: Tokens(WIDTH, spread=lambda p, n: p.expand(n, 2, -1)),
        set(),
    ),
    "vector expanded to no batch": (
        lambda: Tokens(
            WIDTH, spread=lambda p, n: p.expand(3, -1).unsqueeze(0).repeat(n, 1, 1)
        ),
        {"token"},
    ),
    "repeated token": (
        lambda: Tokens(1, 2, WIDTH, spread=lambda p, n: p.repeat(n, 1, 1)),
        set(),
    ),
    "repeated tokens": (
        lambda: Tokens(2, WIDTH, spread=lambda p, n: p.repeat((n, 1, 1))),
        set(),
    ),
    "token repeated twice": (
        lambda: Tokens(1, 1, WIDTH, spread=lambda p, n: p.repeat(n, 2, 1)),
        {"token"},
    ),
    "weight half known": (HalfKnown, {"linear.weight"}),
    "difference": (Difference, {"center"}),
    "computed weight": (Scaled, {"linear.weight", "scale"}),
    "tokens first": (lambda: First(linear()), {"module.weight", "module.bias"}),
}


class Net(nn.Module):
    """Embeds tokens, passes them through a body, and classifies their mean."""

    def __init__(self, body: nn.Module, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = embedding or nn.Embedding(VOCABULARY, WIDTH)
        self.body = body
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)).mean(1).tanh())


def net(body: nn.Module, embedding: nn.Module | None = None) -> Net:
    return Net(body, embedding).double().eval()


@pytest.fixture(autouse=True)
def same_weights_each_time() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def token_samples(
    lengths: Sequence[int] = (4,) * 7, labels: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for n, length in enumerate(lengths):
        ids = torch.randint(VOCABULARY, (1, length), generator=generator)
        label = n % CLASSES if labels is None else labels[n]
        samples.append({"input_ids": ids, "labels": torch.tensor([label])})
    return samples


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"])


class TestModules:
    @pytest.mark.parametrize("lengths", [(4,) * 7, (3, 5, 3, 5, 4, 5, 4)])
    @pytest.mark.parametrize("body", BODIES)
    def test_only_uses_that_are_not_known_go_alone(self, body, lengths):
        make, alone = BODIES[body]
        module = make()
        if len(set(lengths)) > 1 and body in {
            "table of positions", "flat table of positions", "norm of two dimensions"
        }:  # fmt: skip
            lengths = (4,) * 6  # these know one length only
        model = net(nn.Sequential(linear(), nn.Tanh(), module))
        names = {f"body.2.{name}" for name in alone}
        check_model(model, token_samples(lengths), cross_entropy, names)

    @pytest.mark.parametrize(
        "body", ["linear", "dilated convolution", "lstm", "tokens first"]
    )
    def test_batches_of_one_are_exact(self, body):
        make, alone = BODIES[body]
        names = {f"body.{name}" for name in alone if body != "tokens first"}
        model = net(make())
        check_model(model, token_samples(), cross_entropy, names, batch_size=1)

    @pytest.mark.parametrize("padding", [0, 3, -1])
    @pytest.mark.parametrize("kind", [nn.Embedding, Lookup])
    def test_padding_of_an_embedding_gets_no_gradient(self, kind, padding):
        table = kind(VOCABULARY, WIDTH, padding_idx=padding)
        model = net(linear(), table)
        with torch.no_grad():
            table.weight[padding] = 1.0
        samples = token_samples()
        for sample in samples:
            sample["input_ids"][0, 1] = padding % VOCABULARY
        check_model(model, samples, cross_entropy, set())

    def test_an_embedding_may_be_used_twice_and_tied_to_the_output(self):
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(VOCABULARY, WIDTH)
                self.out = nn.Linear(WIDTH, VOCABULARY)
                self.out.weight = self.table.weight

            def forward(self, ids: Tensor) -> Tensor:
                hidden = self.table(ids) + self.table((ids + 1) % VOCABULARY).tanh()
                return self.out(hidden).mean(1)

        check_model(Tied().double(), token_samples(), cross_entropy, set())

    def test_a_table_that_is_looked_up_and_added_goes_alone(self):
        class Added(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(4, WIDTH)
                self.head = linear()

            def forward(self, ids: Tensor) -> Tensor:
                hidden = self.table(ids % 4) + self.table.weight
                return self.head(hidden.tanh()).mean(1)

        model = Added().double()
        check_model(model, token_samples(), cross_entropy, {"table.weight"})

    @pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq"])
    def test_odd_embeddings_are_exact(self, option):
        options = {"max_norm": 1e9} if option == "max_norm" else {option: True}
        table = nn.Embedding(VOCABULARY, WIDTH, **options)
        model = net(linear(), table)
        check_model(model, token_samples(), cross_entropy, {"embedding.weight"})

    @pytest.mark.parametrize("body", ["lstm", "dilated convolution"])
    def test_recurrent_layers_do_without_cudnn(self, body):
        """There, they have a backward pass in training mode only."""
        model, seen = net(BODIES[body][0]()), []
        before = torch.backends.cudnn.enabled
        model.register_forward_hook(
            lambda *_: seen.append(torch.backends.cudnn.enabled)
        )
        check_model(model, token_samples(), cross_entropy)
        assert set(seen) == {before, before and body != "lstm"}
        assert torch.backends.cudnn.enabled == before

    def test_several_rows_of_a_sample_stay_together(self):
        """As in multiple choice: the choices of all samples are one batch."""

        class Choices(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(VOCABULARY, WIDTH)
                self.norm = LlamaNorm()
                self.linear = linear()
                self.head = nn.Linear(WIDTH, 1)

            def forward(self, ids: Tensor) -> Tensor:
                rows = ids.flatten(0, 1)
                hidden = self.linear(self.table(rows).mean(1))
                return self.head(self.norm(hidden).tanh()).view(ids.shape[:2])

        generator = torch.Generator().manual_seed(0)
        samples = [
            {
                "input_ids": torch.randint(VOCABULARY, (1, 3, 4), generator=generator),
                "labels": torch.tensor([n % 3]),
            }
            for n in range(6)
        ]
        check_model(Choices().double(), samples, cross_entropy, set())

    def test_experts_go_with_batches_whatever_the_model_computes_them_by(self):
        config = MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            num_local_experts=4, max_position_embeddings=16,
        )  # fmt: skip
        model = MixtralForCausalLM(config).eval()
        before = model.config.to_dict(), model.config._experts_implementation
        samples = [
            {**s, "labels": s["input_ids"]} for s in token_samples((5, 4, 5, 4, 3, 5))
        ]
        pool = find_candidates(model, IRDConfig(task_type="CAUSAL_LM", density=0.1))
        found = compute(model, Calibration(samples), pool)
        assert not any("attn" in name or "norm" in name for name in found.alone)
        assert (model.config.to_dict(), model.config._experts_implementation) == before

    def test_a_state_that_a_forward_leaves_is_not_kept(self):
        class Stateful(nn.Linear):
            state: Tensor | None = None

            def __init__(self) -> None:
                super().__init__(WIDTH, WIDTH)
                self.state = None

            def forward(self, x: Tensor) -> Tensor:
                self.state = super().forward(x)
                return self.state

        model = net(Stateful())
        check_model(model, token_samples(), cross_entropy)
        assert model.body.state is None

    def test_checkpoints_that_are_always_on_are_exact(self):
        model = net(Checkpointed(reentrant=False))
        check_model(model, token_samples(), cross_entropy)

    def test_reentrant_checkpoints_that_are_always_on_are_refused(self):
        """With them, torch gives no gradients of chosen parameters."""
        model = net(Checkpointed(reentrant=True))
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            check_model(model, token_samples(), cross_entropy)

    def test_the_mean_of_the_batch_in_the_features_is_found_out(self):
        model = net(nn.Sequential(linear(), Centred()))
        everything = {name for name, _ in model.named_parameters()}
        check_model(model, token_samples(), cross_entropy, everything)

    def test_samples_that_swap_their_features_are_found_out(self):
        class Rolled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.roll(1, 0)

        model = net(nn.Sequential(linear(), Rolled()))
        # Those that are tried have equal labels, so their loss is right.
        samples = token_samples(labels=[1, 1, 0, 2, 1, 0, 2])
        check_model(model, samples, cross_entropy)

    @pytest.mark.parametrize("batch_size", [1, 2, None])
    @pytest.mark.parametrize(
        "sent",
        [
            (1, 1, 3, 1, 1, 3, 2),
            (2, 2, 3, 1, 1, 3, 2),
            (3, 3, 3, 1, 1, 3, 2),
            (1, 1, 2, 0),
            (1, 1, 0, 2, 0, 2),
            (4, 4, 4, 4, 0, 4, 0),
        ],
    )
    def test_experts_that_tokens_are_routed_to_are_exact(self, sent, batch_size):
        """The first two samples send equally many tokens, others do not."""
        model = net(Experts())
        samples = token_samples((4,) * len(sent))
        for sample, count in zip(samples, sent, strict=True):
            ids = sample["input_ids"]
            ids.copy_(ids % (VOCABULARY - 1))
            ids[0, :count] = VOCABULARY - 1
        with torch.no_grad():
            model.embedding.weight[:, 0].abs_().neg_()
            model.embedding.weight[-1, 0] = 1.0
        check_model(model, samples, cross_entropy, batch_size=batch_size)

    @pytest.mark.parametrize("batch_size", [1, None])
    @pytest.mark.parametrize("lengths", [(3, 3, 3, 5, 5), (5, 5, 3, 3, 3)])
    @pytest.mark.parametrize("body", ["dilated convolution", "linear", "lstm"])
    def test_a_branch_that_only_some_samples_take_is_exact(
        self, body, lengths, batch_size
    ):
        class Branch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.extra = BODIES[body][0]()

            def forward(self, x: Tensor) -> Tensor:
                return x + self.extra(x) if x.shape[1] > 3 else x

        samples = token_samples(lengths)
        model = net(nn.Sequential(linear(), Branch()))
        check_model(model, samples, cross_entropy, batch_size=batch_size)
        # Nothing but the branch is targeted: some samples have no gradient at all.
        options = {"batch_size": batch_size, "target_modules": ".*extra.*"}
        check_model(model, samples, cross_entropy, **options)

    @pytest.mark.parametrize("pick", PICKS)
    def test_tokens_are_picked_in_many_ways(self, pick):
        """Those that are tried send none; others send two tokens to a batch of two."""
        self.check_routed(Experts(PICKS[pick]))

    def test_tokens_are_picked_by_their_numbers(self):
        """Two in a batch of two, of which one sample has both, or each has one."""

        class Special(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(VOCABULARY, WIDTH)
                self.extra, self.project = nn.Embedding(3, WIDTH), linear()
                self.head = nn.Linear(WIDTH, CLASSES)

            def forward(self, ids: Tensor) -> Tensor:
                is_special = ids >= VOCABULARY - 3
                found = self.extra(ids[is_special] - (VOCABULARY - 3))
                hidden = self.table(ids).index_put(
                    (is_special,), self.project(found).tanh(), accumulate=True
                )
                return self.head(hidden.mean(1))

        samples = token_samples((4,) * 6)
        for sample, count in zip(samples, (1, 1, 2, 0, 1, 1), strict=True):
            ids = sample["input_ids"]
            ids.copy_(ids % (VOCABULARY - 3))
            ids[0, :count] = VOCABULARY - 1
        check_model(Special().double(), samples, cross_entropy, batch_size=2)

    def test_samples_that_are_sorted_by_their_tokens_are_told_apart(self):
        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            ids, labels = batch["input_ids"], batch["labels"]
            order = ids[:, 0].argsort()
            return F.cross_entropy(model(ids[order]), labels[order])

        samples = token_samples((4,) * 6)
        for sample, first in zip(samples, (0, 5, 3, 4, 1, 9), strict=True):
            sample["input_ids"][0, 0] = first  # those that are tried are in order
        check_model(net(linear()), samples, loss)

    @pytest.mark.parametrize("way", WAYS_THROUGH)
    def test_picked_tokens_stay_so_whatever_is_done_with_them(self, way):
        self.check_routed(Experts(through=WAYS_THROUGH[way]))

    @staticmethod
    def check_routed(experts: nn.Module) -> None:
        model = net(experts)
        samples = token_samples((4,) * 8)
        for sample, count in zip(samples, (0, 0, 2, 0, 1, 1, 2, 0), strict=True):
            ids = sample["input_ids"]
            ids.copy_(ids % (VOCABULARY - 1))
            ids[0, :count] = VOCABULARY - 1
        with torch.no_grad():
            model.embedding.weight[:, 0].abs_().neg_()
            model.embedding.weight[-1, 0] = 1.0
        for batch_size in (2, None):
            check_model(model, samples, cross_entropy, batch_size=batch_size)

    @pytest.mark.parametrize("first", [(2, 3, 5, 7), (2, 3, 5, 5)])
    def test_a_batch_is_tried_before_any_is_trusted(self, first, monkeypatch):
        """Equal shapes come late, behind samples that are only alike if padded."""
        monkeypatch.setattr(trial, "_LOOKED_AT", 4)
        samples = token_samples((*first, 4, 6, 4, 4))
        model = net(linear())
        everything = {name for name, _ in model.named_parameters()}
        check_model(model, samples, LOSSES["mean"], set())
        check_model(model, samples, MIXING_LOSSES["mean by hand"], everything)

    @pytest.mark.parametrize("shorter", [(2, 3, 2, 3), (3, 3, 3, 3)])
    @pytest.mark.parametrize("longer", [(4, 5, 4, 5), (5, 5, 5, 5)])
    def test_each_kind_of_samples_is_tried(self, longer, shorter):
        """What is exact for samples with some fields need not be for others."""
        samples = token_samples((*longer, *shorter))
        for sample in samples[len(longer) :]:
            sample["weights"] = torch.ones(1)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            is_other = "weights" in batch
            return (MIXING_LOSSES["mean by hand"] if is_other else cross_entropy)(
                model, batch
            )

        model = net(linear())
        everything = {name for name, _ in model.named_parameters()}
        check_model(model, samples, loss, everything)

    def test_a_kind_at_odd_positions_is_tried(self):
        samples = token_samples((3, 4) * 64)
        for sample in samples[1::2]:
            sample["weights"] = torch.ones(1)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            is_other = "weights" in batch
            return (MIXING_LOSSES["mean by hand"] if is_other else cross_entropy)(
                model, batch
            )

        check_model(net(linear()), samples, loss)

    def test_samples_that_are_kept_may_do_without_some_parameters(self):
        model, samples = net(Either()), token_samples((4, 3) * 4)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            weight = 10.0 if batch["input_ids"].shape[1] > 3 else 0.1
            return weight * cross_entropy(model, batch)

        config = IRDConfig(density=0.1, num_samples=8, initial_density=0.9)
        found = select_parameters(model, config, Calibration(samples, loss=loss))
        assert len(found.samples) < 4  # long ones alone
        assert all(position % 2 == 0 for position in found.samples)
        config = IRDConfig(density=0.1, num_samples=4, method="fish")
        data = Calibration(samples[::2], loss=loss)
        with pytest.raises(ValueError, match=r"no gradient from any.*short"):
            select_parameters(model, config, data)

    def test_a_parameter_that_one_kind_of_samples_uses_goes_with_batches(self):
        samples = token_samples((4, 4, 4, 3, 3, 3))
        for sample in samples[3:]:
            sample["weights"] = torch.ones(1)
        check_model(net(Either()), samples, cross_entropy, set())

    @pytest.mark.parametrize(("batch_size", "tried"), [(2, 2), (3, 3), (None, 3)])
    def test_no_more_samples_are_tried_than_make_a_batch(
        self, batch_size, tried, monkeypatch
    ):
        sizes = []
        compare = trial.Trial._compare

        def noting(self: Any, pair: Any, *args: Any) -> Any:
            sizes.append(len(pair.samples))
            return compare(self, pair, *args)

        monkeypatch.setattr(trial.Trial, "_compare", noting)
        model = make_model("bert").double()
        batches = [as_batch(sample) for sample in make_samples("bert", 6)]
        check_model(model, batches, alone=set(), batch_size=batch_size)
        assert set(sizes) == {tried}

    def test_processes_agree_on_what_is_exact_for_all(self):
        one = trial.Outcome(True, True, frozenset({1}), False, 4.0, 2.0, 9.0)
        two = trial.Outcome(False, True, frozenset({2}), True, 3.0, 8.0, 9.5)
        both = trial.Outcome(False, True, frozenset({1, 2}), True, 4.0, 8.0, 9.5)
        assert trial.Outcome.agreed([one, two]) == both
        assert trial.Outcome.agreed([one]) == one

    def test_a_batch_that_does_not_fit_is_no_reason_to_go_one_by_one(self, monkeypatch):
        def run(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(trial.Together, "run", run)
        config = IRDConfig(density=0.1, num_samples=4)
        with pytest.raises(RuntimeError, match=r"out of memory.*pass a `memory_limit`"):
            select_parameters(make_model("gpt2"), config, make_samples("gpt2", 4))

    def test_samples_that_no_other_is_like_go_alone(self, caplog):
        caplog.set_level("INFO", logger="peft_ird")
        samples = token_samples((2, 3, 4, 5))
        loss = MIXING_LOSSES["mean by hand"]
        check_model(net(linear()), samples, loss, set(), batch_size=1)
        assert not caplog.messages
        check_model(net(linear()), samples, loss, set())
        assert "No two of the 4 samples may share a batch" in caplog.text

    def test_positions_that_all_samples_share_are_no_batch(self):
        """Looked up as ``[t, t]``, which is a batch where there are t samples."""

        class Relative(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Embedding(9, WIDTH)

            def forward(self, x: Tensor) -> Tensor:
                at = torch.arange(x.shape[1])
                return x * self.bias(at[:, None] - at + 4).mean(1)

        model = net(nn.Sequential(linear(), Relative()))
        samples = token_samples((2, 2, 2, 4, 4, 4, 4, 4))
        for batch_size in (2, 4, None):
            alone = {"body.1.bias.weight"}
            check_model(model, samples, cross_entropy, alone, batch_size)

    @pytest.mark.parametrize(
        "lengths", [(6, 7, 8, 8, 10, 12), (6, 6, 7, 6, 6, 7, 8, 12, 12, 12)]
    )
    def test_frequencies_that_change_with_the_length_are_exact_and_come_back(
        self, lengths, monkeypatch
    ):
        monkeypatch.setattr(trial, "_LOOKED_AT", 6)  # of which the first are short
        config = Phi3Config(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
            max_position_embeddings=32, original_max_position_embeddings=8,
            rope_scaling={"type": "longrope", "long_factor": [2.0, 3.0, 4.0, 8.0],
                          "short_factor": [1.0] * 4},
        )  # fmt: skip
        model = Phi3ForCausalLM(config).double().eval()
        with torch.no_grad():  # attention as fresh as that hardly sees any position
            for parameter in model.parameters():
                parameter.mul_(4.0)
        before = {name: b.clone() for name, b in model.named_buffers()}
        samples = token_samples(lengths)
        for sample in samples:
            sample["labels"] = sample["input_ids"]
        check_model(model, samples)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name])

    def test_texts_that_are_packed_into_a_sample_stay_apart(self):
        model = make_model("llama").double()
        model.config.use_cache = False
        samples = []
        joined = [[5, 4], [6, 3], [3, 4, 3]]
        for texts in ([4], [5], *[[8]] * 9, *joined, [12]):  # tried: 4, 8 and 12
            ids = torch.randint(3, 40, (1, sum(texts)))
            places = torch.cat([torch.arange(text) for text in texts])[None]
            samples.append({"input_ids": ids, "position_ids": places, "labels": ids})
        check_model(model, samples)

    @pytest.mark.parametrize("is_detached", [False, True])
    def test_a_frozen_tower_is_left_alone(self, is_detached):
        class Towers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tower, self.own = linear(), linear()

            def forward(self, x: Tensor) -> Tensor:
                with torch.set_grad_enabled(not is_detached):
                    y = self.tower(x)
                return self.own(x + y)

        body = Towers()
        body.tower.requires_grad_(False)
        model, samples = net(body), token_samples(LENGTHS)
        config = IRDConfig(density=0.1, target_modules=["own"])
        pool = find_candidates(model, config)
        assert {module for module, _ in pool.names} == {"body.own"}
        expected = expected_of(model, samples, pool, cross_entropy)
        found = compute(model, Calibration(samples, loss=cross_entropy), pool)
        check(found, expected, set())
        assert not any(p.requires_grad for p in body.tower.parameters())

    def test_a_parameter_in_a_list_is_taken_alone(self):
        class Doubled(OneRow):
            def forward(self, x: Tensor) -> Tensor:
                halves = torch.cat([self.scale, self.scale]).sum(0)
                left, right = self.scale.chunk(2, 1)
                return x * self.scale + halves + torch.cat([right, left], 1)

        model = net(nn.Sequential(linear(), Doubled()))
        check_model(model, token_samples(), cross_entropy, {"body.1.scale"})

    def test_a_parameter_in_a_list_of_a_branch_is_noticed_later(self):
        class Doubled(OneRow):
            def forward(self, x: Tensor) -> Tensor:
                x = x * self.scale
                if x.shape[1] == 3:  # those that are tried are longer
                    x = x + torch.cat([self.scale, self.scale]).sum(0)
                return x

        model = net(nn.Sequential(linear(), Doubled()))
        check_model(model, token_samples((3, 3, 4, 4, 3)), cross_entropy)


class OneRow(nn.Module):
    """Has a row of factors; what is done with it is left to others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1, WIDTH))


class Experts(nn.Module):
    """Sends each token to one of two small networks."""

    def __init__(
        self,
        pick: Callable[[Tensor, Tensor], Tensor] | None = None,
        through: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.pick, self.through = pick or PICKS["index"], through
        self.experts = nn.ModuleList(
            nn.Sequential(linear(), nn.Tanh(), linear()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = (tokens[:, 0] > 0).long()
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().flatten()
            picked = self.pick(x, (chosen == number).view(x.shape[:2]))
            total = total.index_add(0, mine, expert(self.through(picked)))
        return total.view_as(x)


def log_chances(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])
    return -logits.log_softmax(-1).gather(1, batch["labels"][:, None])[:, 0]


def targets_of(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Numbers in [0, 1] like the logits, different for each sample."""
    ids = batch["input_ids"][:, :1]
    classes = torch.arange(CLASSES)
    return (((ids + classes) % 5) / 5).to(logits.dtype)


def towards_targets(function: Callable[..., Tensor], **options: Any) -> Loss:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"])
        return function(logits, targets_of(logits, batch), **options)

    return loss


def of_cross_entropy(**options: Any) -> Loss:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"]), batch["labels"], **options)

    return loss


def two_terms(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])
    error = F.mse_loss(logits, targets_of(logits, batch))
    return F.cross_entropy(logits, batch["labels"]) + 0.1 * error


class_weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "mean": of_cross_entropy(),
    "sum": of_cross_entropy(reduction="sum"),
    "one per sample": of_cross_entropy(reduction="none"),
    "column": lambda m, b: log_chances(m, b)[:, None],
    "sum by hand": lambda m, b: log_chances(m, b).sum(),
    "weighted classes": of_cross_entropy(weight=class_weights),
    "smoothed labels": of_cross_entropy(label_smoothing=0.1),
    "nll": lambda m, b: F.nll_loss(
        m(b["input_ids"]).log_softmax(-1), b["labels"], weight=class_weights
    ),
    "squared error": towards_targets(F.mse_loss),
    "absolute error": towards_targets(F.l1_loss),
    "smooth error": towards_targets(F.smooth_l1_loss),
    "several labels": towards_targets(F.binary_cross_entropy_with_logits),
    "weighted labels": towards_targets(
        F.binary_cross_entropy_with_logits, pos_weight=class_weights
    ),
    "chances": towards_targets(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y)),
    "soft labels": towards_targets(F.cross_entropy),
    "two terms": two_terms,
    "small": lambda m, b: 1e-9 * F.cross_entropy(m(b["input_ids"]), b["labels"]),
}
MIXING_LOSSES: dict[str, Loss] = {
    "mean by hand": lambda m, b: log_chances(m, b).mean(),
    "square of a mean": lambda m, b: log_chances(m, b).mean().square(),
    "logsumexp": lambda m, b: log_chances(m, b).logsumexp(0),
    "largest": lambda m, b: log_chances(m, b).max(),
    "mean and penalty": lambda m, b: (
        F.cross_entropy(m(b["input_ids"]), b["labels"])
        + m(b["input_ids"]).square().mean()
    ),
}


class TestLosses:
    def test_parameters_of_the_loss_keep_their_gradients(self):
        centres = nn.Linear(CLASSES, CLASSES, bias=False, dtype=torch.float64)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(centres(model(batch["input_ids"])), batch["labels"])

        model, samples = net(linear()), token_samples()
        check_model(model, samples, loss, set())
        centres.weight.grad = None
        pool = find_candidates(model, IRDConfig(density=0.1))
        compute(model, Calibration(samples, loss=loss), pool)
        assert centres.weight.grad is None

    @pytest.mark.parametrize("loss", LOSSES)
    def test_means_sums_and_vectors_are_exact_in_batches(self, loss):
        check_model(net(linear()), token_samples(), LOSSES[loss], set())

    @pytest.mark.parametrize("loss", MIXING_LOSSES)
    def test_losses_that_mix_samples_are_found_out(self, loss):
        model = net(linear())
        everything = {name for name, _ in model.named_parameters()}
        check_model(model, token_samples(), MIXING_LOSSES[loss], everything)

    @pytest.mark.parametrize("loss", ["own", "mean", "mean by hand", "one per sample"])
    @pytest.mark.parametrize("counts", [(1, 2, 4, 3, 4), (2, 2, 4, 1, 3)])
    def test_a_mean_over_labelled_tokens_is_exact(self, counts, loss):
        """Also where the two samples that are tried have equally many labels."""
        samples = labelled_tokens(counts)
        model = Tagger().double()
        everything = {name for name, _ in model.named_parameters()}
        alone = everything if loss == "mean by hand" else set()
        check_model(model, samples, TOKEN_LOSSES[loss], alone)

    @pytest.mark.parametrize("batch_size", [2, None])
    @pytest.mark.parametrize(
        "counts", [(1, 2, 4, 3), (1, 1, 2, 1, 3), (2, 2, 1, 3), (3, 3, 2, 4)]
    )
    def test_a_mean_over_tokens_that_are_picked_is_exact(self, counts, batch_size):
        """Their number may be a multiple of that of the samples, by chance."""
        samples = labelled_tokens(counts)
        check_model(Tagger().double(), samples, picked_mean, batch_size=batch_size)

    @pytest.mark.parametrize("batch_size", [1, 2, None])
    @pytest.mark.parametrize(
        "counts", [(0, 2, 4, 3, 0), (2, 0, 0, 0, 4), (4, 3, 0, 1, 2)]
    )
    @pytest.mark.parametrize("loss", ["own", "mean", "picked"])
    def test_a_sample_without_labels_counts_as_zero(self, loss, counts, batch_size):
        samples = labelled_tokens(counts)
        model = Tagger().double()
        pool = find_candidates(model, IRDConfig(density=0.1))
        expected = expected_of(model, samples, pool, mean_or_zero)
        calibration = Calibration(samples, None, TOKEN_LOSSES[loss], batch_size)
        is_exact = loss != "picked" or batch_size == 1
        check(compute(model, calibration, pool), expected, set() if is_exact else None)

    def test_samples_without_labels_are_not_tried(self):
        """Zero is their gradient in any batch."""
        samples = labelled_tokens((0, 2, 4, 0), lengths=(3, 4, 4, 5))
        model = Tagger()
        model.linear = nn.Sequential(linear(), Centred())
        pool = find_candidates(model.double(), IRDConfig(density=0.1))
        expected = expected_of(model, samples, pool, mean_or_zero)
        found = compute(model, Calibration(samples, batch_size=2), pool)
        check(found, expected, set(names_of(pool)))

    def test_a_mean_of_one_number_is_exact_in_batches_of_one(self):
        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            logits = model(batch["input_ids"])
            return F.mse_loss(logits.sum(), targets_of(logits, batch).sum())

        check_model(net(linear()), token_samples(), loss, set(), batch_size=1)


def labelled_tokens(
    counts: Sequence[int], lengths: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """Samples of which so many tokens have a label; of four tokens by default."""
    samples = token_samples(lengths or (4,) * len(counts))
    for sample, count in zip(samples, counts, strict=True):
        labels = sample["input_ids"] % CLASSES
        labels[0, count:] = -100
        sample["labels"] = labels
    return samples


class Tagger(nn.Module):
    """Labels every token; gives a loss as a model of Hugging Face does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.linear = linear()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        logits = self.head(self.linear(self.embedding(input_ids)).tanh())
        loss = F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))
        return SimpleNamespace(loss=loss, logits=logits)


def by_token(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(**batch).logits
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    return losses, batch["labels"].ne(-100)


def token_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses, counts = by_token(model, batch)
    return (losses * counts).sum() / counts.sum()


def mean_or_zero(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses, counts = by_token(model, batch)
    return (losses * counts).sum() / max(1, int(counts.sum()))


def picked_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    is_picked = batch["labels"] != -100
    logits = model(**batch).logits[is_picked]
    return F.cross_entropy(logits, batch["labels"][is_picked])


def sample_means(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses, counts = by_token(model, batch)
    return (losses * counts).sum(1) / counts.sum(1)


TOKEN_LOSSES: dict[str, Loss | None] = {
    "own": None,
    "mean": lambda m, b: F.cross_entropy(m(**b).logits.transpose(1, 2), b["labels"]),
    "mean by hand": token_mean,
    "one per sample": sample_means,
    "picked": picked_mean,
}


class Detector(nn.Module):
    """Takes a dictionary for each sample, with as many classes as there are things."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(linear())
        self.config = SimpleNamespace(num_labels=CLASSES)

    def forward(self, input_ids: Tensor, labels: list[dict[str, Any]]) -> Any:
        logits = self.net(input_ids)
        losses = [
            F.cross_entropy(row.expand(len(label["classes"]), -1), label["classes"])
            for row, label in zip(logits, labels, strict=True)
        ]
        return SimpleNamespace(loss=torch.stack(losses).sum())


@pytest.mark.parametrize("form", ["collated", "rows", "loader"])
def test_dictionaries_in_a_batch_stay_as_they_are(form):
    samples = token_samples(labels=[0] * 7)
    for n, sample in enumerate(samples):
        # Printed, most of it is left out, and the samples look alike.
        classes = torch.zeros(2000, dtype=torch.long)
        classes[9 : 200 * n] = 1
        sample["labels"] = [{"name": "a picture", "classes": classes}]
    data = {
        "collated": Calibration([[s] for s in samples], lambda rows: rows[0][0]),
        "rows": [
            {"input_ids": s["input_ids"][0], "labels": s["labels"][0]} for s in samples
        ],
        "loader": DataLoader(samples, 3, collate_fn=joined_samples),
    }
    model = Detector().double()
    pool = find_candidates(model, IRDConfig(density=0.1))
    found = compute(model, Calibration.of(data[form]), pool)
    check(found, expected_of(model, samples, pool), set())


def joined_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples]),
        "labels": [label for sample in samples for label in sample["labels"]],
    }


class Pooled(nn.Module):
    """Takes one more field per token, which batches do not know how to pad."""

    def __init__(self, over_padding: bool) -> None:
        super().__init__()
        self.over_padding = over_padding
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.linear = linear()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        boxes: Tensor | None = None,
    ) -> SimpleNamespace:
        x = self.embedding(input_ids)
        x = self.linear(x if boxes is None else x + boxes).tanh()
        seen = torch.ones_like(attention_mask) if self.over_padding else attention_mask
        pooled = (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        return SimpleNamespace(loss=F.cross_entropy(self.head(pooled), labels))


@pytest.mark.parametrize("has_boxes", [True, False])
@pytest.mark.parametrize("over_padding", [True, False])
@pytest.mark.parametrize("lengths", [(3, 3, 4, 6, 6), (3, 4, 5, 6, 6)])
def test_padding_that_a_model_sees_is_part_of_the_sample(
    lengths, over_padding, has_boxes
):
    """Also where the two samples of equal length that are tried have none."""
    samples = []
    for n, (length, sample) in enumerate(
        zip(lengths, token_samples(lengths), strict=True)
    ):
        generator = torch.Generator().manual_seed(n)
        boxes = torch.rand(1, 6, WIDTH, generator=generator, dtype=torch.float64)
        ids = sample["input_ids"]
        padded = padded_to(6, {**sample, "attention_mask": torch.ones_like(ids)})
        assert padded["attention_mask"].sum() == length
        samples.append({**padded, "boxes": boxes} if has_boxes else padded)
    check_model(Pooled(over_padding).double(), samples)


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_fisher_information_is_close_to_that_in_float64(self, name, dtype):
        model = make_model(name).to(dtype)
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(name)))
        batches = hf_samples(name)
        found = compute(model, Calibration(batches), pool)
        assert found.alone == set()
        check_closeness(found.fisher, expected_of(model, batches, pool).fisher)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("kind", ["bert", "llama-classifier"])
    def test_losses_may_be_rounded_as_the_parameters_are(self, kind, seed):
        model = make_model(kind, seed)
        (model.classifier if kind == "bert" else model.score).weight.data *= 40
        model = model.bfloat16()
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(kind)))
        assert compute(model, Calibration(hf_samples(kind)), pool).alone == set()

    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("factor", [1e-5, 1e3])
    def test_tiny_and_large_losses_in_float16_keep_their_digits(
        self, name, factor, keep
    ):
        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return factor * model(**batch).loss.float()

        model = make_model(name).half()
        pool = find_candidates(model, IRDConfig(density=0.1, **settings_of(name)))
        batches = hf_samples(name)
        found = compute(model, Calibration(batches, loss=loss), pool, keep)
        assert found.alone == set()
        expected = expected_of(model, batches, pool, loss).fisher
        check_closeness(found.fisher, expected)
        large = expected > 1e-4 * expected.max()
        assert (found.fisher[large] > 0).all()

    def test_a_tiny_loss_in_float16_does_not_vanish_one_sample_at_a_time(self):
        """Here the linear layer is exact in batches, the convolution is not."""

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return 1e-5 * cross_entropy(model, batch).float()

        model = net(BODIES["dilated convolution"][0]()).half()
        samples = token_samples()
        pool = find_candidates(model, IRDConfig(density=0.1))
        found = compute(model, Calibration(samples, loss=loss), pool)
        assert found.alone == {"body.module.weight", "body.module.bias"}
        check_closeness(found.fisher, expected_of(model, samples, pool, loss).fisher)


def check_closeness(found: Tensor, expected: Tensor) -> None:
    """See that large entries are within 10 %, and that all correlate."""
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    both = torch.stack([found.double(), expected])
    assert torch.corrcoef(both)[0, 1] > 0.99
    large = expected > 0.01 * expected.max()
    assert (found[large] / expected[large] - 1).abs().max() < 0.1


class Tampering(torch.autograd.Function):
    """The identity; the backward pass multiplies by a factor for each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (factors,) = ctx.saved_tensors
        return grads[0] * factors[:, None], None


def tampered_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = Tampering.apply(model(batch["input_ids"]), batch["factor"])
    return F.cross_entropy(logits, batch["labels"]) * batch["scale"].mean()


def per_sample_tampered_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = Tampering.apply(model(batch["input_ids"]), batch["factor"])
    losses = F.cross_entropy(logits, batch["labels"], reduction="none")
    return losses * batch["scale"]


@dataclass
class State:
    """What a selection must leave as it was."""

    modes: list[bool]
    flags: list[bool]
    grads: list[Tensor | None]
    values: dict[str, Tensor]
    generators: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "State":
        return cls(
            [module.training for module in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()],
            copy.deepcopy(model.state_dict()),
            (torch.get_rng_state().tolist(), random.getstate()),
        )

    def check(self, model: nn.Module) -> None:
        now = State.of(model)
        assert now.modes == self.modes
        assert now.flags == self.flags
        pairs = zip(now.grads, self.grads, strict=True)
        assert all(mine is theirs for mine, theirs in pairs)
        assert all(torch.equal(v, self.values[k]) for k, v in now.values.items())
        assert now.generators == self.generators
        assert _get_current_function_mode_stack() == []
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
        for parameter in model.parameters():
            assert not parameter._backward_hooks


def half_trained(model: nn.Module) -> nn.Module:
    """Put a model into a state of its own: modes, flags and gradients differ."""
    model.train()
    model.body.eval()
    model.embedding.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


LENGTHS = (3, 5, 3, 4, 6, 4, 5, 8, 6, 3, 8, 4)  # 0 is among the shortest, 7 is longest


class TestBadSamples:
    @pytest.mark.parametrize("method", ["ird", "reverse_ird", "fish", "gradient"])
    @pytest.mark.parametrize("batch_size", [1, 3, None])
    @pytest.mark.parametrize("bad", [0, 4, 7])
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("scale", torch.nan, "The loss of calibration sample {} must be"),
            ("scale", torch.inf, "The loss of calibration sample {} must be"),
            ("factor", torch.inf, "is not finite on calibration sample {}\\."),
            ("factor", torch.nan, "is not finite on calibration sample {}\\."),
        ],
    )
    def test_exactly_the_bad_sample_is_named(
        self, field, value, message, bad, batch_size, method
    ):
        samples = token_samples(LENGTHS)
        for n, sample in enumerate(samples):
            for name in ("scale", "factor"):
                is_bad = n == bad and name == field
                number = value if is_bad else 1.0 + n / 10
                sample[name] = torch.tensor([number], dtype=torch.float64)
        model = half_trained(net(linear()))
        config = IRDConfig(density=0.1, num_samples=12, method=method)
        calibration = Calibration(
            samples, loss=per_sample_tampered_loss, batch_size=batch_size
        )
        before = State.of(model)
        with pytest.raises(ValueError, match=message.format(bad)):
            select_parameters(model, config, calibration)
        before.check(model)

    def test_squares_that_overflow_in_sum_are_not_blamed_on_one_sample(self):
        samples = token_samples(LENGTHS)
        for sample in samples:
            sample["scale"] = torch.ones(1)
            sample["factor"] = torch.tensor([1e25])
        model = net(linear()).float()
        config = IRDConfig(density=0.1, num_samples=12, method="fish")
        calibration = Calibration(samples, loss=per_sample_tampered_loss)
        message = "are of torch.float32, losses times 1"
        with pytest.raises(ValueError, match=message):
            select_parameters(model, config, calibration)

    @pytest.mark.parametrize("bad", [0, 7])
    def test_a_label_that_is_not_finite_is_named(self, bad):
        samples = make_samples("bert-regression")
        samples[bad]["labels"] = torch.nan
        model = make_model("bert-regression")
        config = IRDConfig(density=0.1, num_samples=12, task_type="SEQ_CLS")
        with pytest.raises(ValueError, match=f"loss of calibration sample {bad} must"):
            select_parameters(model, config, samples)


class Stopping(torch.autograd.Function):
    """The identity, whose backward pass may be interrupted."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, stop: Callable[[], None]) -> Tensor:
        ctx.stop = stop
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.stop()
        return grads[0], None


class Interruption:
    """A loss during which, or during whose backward pass, the user loses patience."""

    def __init__(self, when: str, after: int | None) -> None:
        self.when = when
        self.after = after
        self.calls = {"forward": 0, "backward": 0}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = cross_entropy(model, batch)
        self.count("forward")
        return Stopping.apply(loss, lambda: self.count("backward"))

    def count(self, phase: str) -> None:
        self.calls[phase] += 1
        if self.when == phase and self.calls[phase] == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("body", ["linear", "dilated convolution"])
def test_an_interrupted_selection_leaves_nothing_behind(body, phase):
    def select(loss: Loss) -> Selection:
        calibration = Calibration(token_samples(LENGTHS), loss=loss, batch_size=4)
        config = IRDConfig(density=0.1, num_samples=12, initial_density=0.4)
        return select_parameters(model, config, calibration)

    model = half_trained(net(BODIES[body][0]()))
    before = State.of(model)
    whole = Interruption(phase, None)
    expected = select(whole)
    before.check(model)
    assert whole.calls[phase] > 4  # the trial alone, in a batch, and then some
    for after in range(1, whole.calls[phase] + 1):
        with pytest.raises(KeyboardInterrupt):
            select(Interruption(phase, after))
        before.check(model)
    assert flat(select(cross_entropy)) == flat(expected)


class TestMemory:
    METHODS = ("ird", "reverse_ird", "fish", "gradient")

    @pytest.mark.parametrize("method", METHODS)
    def test_groups_of_parameters_give_the_same_selection(self, name, method):
        model = make_model(name).double()
        settings = {"density": 0.02, "num_samples": 12, "method": method}
        config = IRDConfig(**settings, **settings_of(name))
        pool = find_candidates(model, config)
        limit = 2 * 8 * max(pool.sizes)
        groups = pool.groups(Limits.of(pool, None, limit).accumulator_bytes, 8)
        assert len(groups) > 3
        samples = make_samples(name)
        expected = select_parameters(model, config, samples)
        found = select_parameters(model, config, samples, memory_limit=limit)
        assert flat(found) == flat(expected)
        assert found.samples == expected.samples

    def test_groups_of_parameters_are_exact_where_some_go_alone(self):
        model = net(BODIES["dilated convolution"][0]())
        samples = token_samples(LENGTHS)
        pool = find_candidates(model, IRDConfig(density=0.1))
        limit = 2 * 8 * max(pool.sizes)
        expected = expected_of(model, samples, pool, cross_entropy)
        calibration = Calibration(samples, loss=cross_entropy)
        found = compute(model, calibration, pool, memory_limit=limit)
        check(found, expected, {"body.module.weight", "body.module.bias"})

    def test_sums_of_chosen_entries_keep_to_the_limit(self, monkeypatch):
        taken = []

        class Watched(fisher.SquareSumAt):
            def __init__(self, pool: Pool, chosen: Any, ranks: Any) -> None:
                super().__init__(pool, chosen, ranks)
                sums = sum(total.nbytes for total in self.totals.values())
                taken.append(sums + sum(where.flat.nbytes for where in chosen.values()))

        monkeypatch.setattr(fisher, "SquareSumAt", Watched)
        model = make_model("bert")
        limit = 4 * 8 * model.bert.embeddings.word_embeddings.weight.numel()
        options = {"num_samples": 6, "initial_density": 1.0, **settings_of("bert")}
        config = IRDConfig(
            density=0.9, nested=True, schedule=[(6, 1.0), (6, 0.9)], **options
        )
        samples = make_samples("bert")
        found = select_parameters(model, config, samples, memory_limit=limit)
        assert len(taken) > 1
        assert max(taken) <= limit // 2
        taken.clear()
        assert flat(found) == flat(select_parameters(model, config, samples))
        assert len(taken) == 1

    def test_a_limit_below_the_largest_parameter_is_refused(self):
        model = make_model("bert")
        config = IRDConfig(density=0.1, num_samples=4, task_type="SEQ_CLS")
        pool = find_candidates(model, config)
        largest = "bert.embeddings.word_embeddings.weight"
        assert model.get_parameter(largest).numel() == max(pool.sizes)
        limit = 2 * 4 * max(pool.sizes) - 1
        message = f"`memory_limit` must.*'{largest}'.*{limit}"
        with pytest.raises(ValueError, match=message):
            select_parameters(model, config, make_samples("bert"), memory_limit=limit)

    @pytest.mark.parametrize("method", ["ird", "reverse_ird"])
    def test_kept_gradients_give_the_same_selection(self, name, method, monkeypatch):
        model = make_model(name).double()
        settings = {"density": 0.02, "num_samples": 12, "method": method}
        config = IRDConfig(**settings, initial_density=0.1, **settings_of(name))
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        found, counts = {}, {}
        for kept in (None, 200_000, 0):
            calls.clear()
            with keeping(kept, monkeypatch):
                found[kept] = select_parameters(
                    model, config, Calibration(make_samples(name), batch_size=3)
                )
            counts[kept] = len(calls)
        handle.remove()
        assert counts[None] < counts[200_000] < counts[0]
        for other in (200_000, 0):
            assert flat(found[other]) == flat(found[None])
            assert found[other].samples == found[None].samples
            scores = [f.sample_scores for f in (found[other], found[None])]
            assert_close(*scores, **TOL[torch.float64])


@contextlib.contextmanager
def keeping(size: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kept gradients take so many bytes."""

    class Limited(Limits):
        @classmethod
        def of(cls, *args: Any) -> Limits:
            limits = Limits.of(*args)
            return limits if size is None else dataclasses.replace(
                limits, cache_bytes=size
            )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(fisher, "Limits", Limited)
        yield


@pytest.mark.parametrize("fields", [
    {"input_ids": (1, 4, 100), "labels": (1,)},
    {"input_ids": (1, 8), "labels": (1, 400)},
    {"inputs_embeds": (1, 400, 16), "labels": (1,)},
])  # fmt: skip
def test_all_choices_and_both_texts_count_as_tokens(fields):
    inputs = {name: torch.zeros(shape).long() for name, shape in fields.items()}
    samples = [Sample(position, inputs) for position in range(20)]
    assert {len(b) for b in plan(samples, 2048, None, padded=True)} == {5}


def test_lengths_do_not_count_padding_on_the_left():
    samples = []
    for length in (3, 6, 12):
        ids = torch.randint(3, 40, (1, 12))
        mask = (torch.arange(12) >= 12 - length).long()[None]
        samples.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    model = make_model("llama")
    pool = find_candidates(model, IRDConfig(density=0.1))
    with borrowed(model):
        estimator = FisherEstimator(model, pool, Calibration(samples))
        assert estimator.lengths([0, 1, 2]).tolist() == [3.0, 6.0, 12.0]


class Masking:
    """A collator that draws by a generator of its own, as transformers' may."""

    seed, generator, return_tensors = 3, None, "pt"

    def __call__(self, samples):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.seed)
        ids = torch.tensor([sample["input_ids"] for sample in samples])
        hidden = torch.rand(ids.shape, generator=self.generator) < 0.3
        return {"input_ids": ids.masked_fill(hidden, 1), "labels": ids}


@pytest.mark.parametrize("is_used", [False, True])
def test_a_collator_that_draws_by_itself_is_left_as_it_was(is_used):
    rows = [{"input_ids": torch.randint(3, 40, (9,)).tolist()} for _ in range(4)]
    model, collator = make_model("llama"), Masking()
    if is_used:
        collator(rows[:1])
    state = collator.generator and collator.generator.get_state()
    config = IRDConfig(density=0.1, method="fish")
    pool = find_candidates(model, config)
    found = []
    for order in (range(4), reversed(range(4))):
        with borrowed(model):
            data = Calibration(rows, collator)
            singles = FisherEstimator(model, pool, data)._engine.singles
            ids = {
                i: singles.sample(i, is_cut=False).inputs["input_ids"] for i in order
            }
            found.append(torch.cat([ids[i] for i in range(4)]))
    assert torch.equal(*found)
    assert len({tuple(row) for row in found[0].eq(1).tolist()}) > 1
    assert (collator.generator is not None) == is_used
    assert not is_used or torch.equal(collator.generator.get_state(), state)
