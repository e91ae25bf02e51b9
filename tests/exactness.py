"""What the package computes from batches, beside one backward pass per sample."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peft_ird import Calibration, IRDConfig
from peft_ird.adapter.targets import find_candidates
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed
from peft_ird.selection.pool import Pool
from tests import oracles
from tests.oracles import TOL

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Found:
    """What the package computes, and which parameters it took sample by sample."""

    fisher: Tensor
    fisher_at: Tensor
    scores: Tensor
    scores_at: Tensor
    mean: Tensor
    losses: Tensor
    alone: set[str]


def joined(stream: Iterator[tuple[int, Tensor]]) -> Tensor:
    return torch.cat([values for _, values in stream])


def names_of(pool: Pool) -> list[str]:
    return [pool.name(part) for part in range(len(pool.sizes))]


def some_entries(pool: Pool) -> list[Tensor]:
    """Every third entry of every other parameter."""
    return [
        torch.arange(0, size * (part % 2), 3) for part, size in enumerate(pool.sizes)
    ]


def compute(
    model: nn.Module,
    calibration: Calibration,
    pool: Pool,
    keep: bool = False,
    **options: Any,
) -> Found:
    """Compute everything; with ``keep``, from gradients of a pass before."""
    samples = tuple(range(len(calibration)))
    entries = some_entries(pool)
    with borrowed(model):
        estimator = FisherEstimator(model, pool, calibration, **options)
        if keep:
            estimator.remember(samples)
        outcome = estimator._engine.prepare(samples)
        return Found(
            joined(estimator.fisher(samples)),
            joined(estimator.fisher_at(samples, entries)),
            estimator.sample_scores(samples, None),
            estimator.sample_scores(samples, entries),
            joined(estimator.mean_gradient(samples)),
            estimator.losses(samples),
            {pool.name(part) for part in outcome.alone},
        )


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def expected_of(
    model: nn.Module, batches: Sequence[Any], pool: Pool, loss: Loss = own_loss
) -> Found:
    gradients = oracles.sample_gradients(model, batches, names_of(pool), loss)
    squares = gradients.square()
    flags = [torch.zeros(size, dtype=torch.bool) for size in pool.sizes]
    for flag, entries in zip(flags, some_entries(pool), strict=True):
        flag[entries] = True
    at = torch.cat(flags)
    whole = copy.deepcopy(model).double().eval()
    losses = [loss(whole, batch).detach().double().reshape(()) for batch in batches]
    return Found(
        squares.mean(0),
        squares[:, at].mean(0),
        squares.sum(1),
        squares[:, at].sum(1),
        gradients.mean(0),
        torch.stack(losses),
        set(),
    )


def check(found: Found, expected: Found, alone: set[str] | None = None) -> None:
    for field in dataclasses.fields(Found)[:-1]:
        assert_close(
            getattr(found, field.name),
            getattr(expected, field.name),
            **TOL[torch.float64],
            msg=lambda text, name=field.name: f"{name}: {text}",
        )
    if alone is not None:
        assert found.alone == alone


def check_model(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    loss: Loss | None = None,
    alone: set[str] | None = None,
    batch_size: int | None = None,
    **settings: Any,
) -> None:
    """Compare everything with the oracle.

    Args:
        model: A float64 model.
        samples: Batches of one, with ``input_ids``.
        loss: A loss of one's own.
        alone: Parameters that must be taken one sample at a time; None for any.
        batch_size: Samples in a batch.
        settings: Options of the configuration.
    """
    pool = find_candidates(model, IRDConfig(density=0.1, **settings))
    calibration = Calibration(samples, loss=loss, batch_size=batch_size)
    expected = expected_of(model, samples, pool, loss or own_loss)
    check(compute(model, calibration, pool), expected, alone)
