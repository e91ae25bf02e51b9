"""A head that has seen the data, lent for the Fisher pass.

A fresh head is random, and so are the gradients that it sends down. A few steps with
the rest of the model frozen give gradients that know the task.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_ird.selection.gradients.engine import Engine
from peft_ird.selection.gradients.lending import requiring_grad

__all__ = ["warmed_up"]

_BATCH = 32


@contextmanager
def warmed_up(
    engine: Engine,
    head: Sequence[nn.Parameter],
    steps: int,
    learning_rate: float,
    seed: int,
) -> Iterator[None]:
    """Train the head for some steps of Adam; it comes back as it was.

    Args:
        engine: What takes samples through the model; use it inside `borrowed`.
        head: Parameters of the head.
        steps: Steps of 32 samples, drawn from all calibration data.
        learning_rate: Adam's.
        seed: Seed of the draw.

    Raises:
        ValueError: If there is no head to train.
    """
    if not head:
        raise ValueError(
            "`head_warmup_steps` needs a head that is trained whole; name it in "
            "`modules_to_save`, or give the `task_type`."
        )
    before = [(p, p.detach().clone()) for p in head]
    try:
        with requiring_grad(head):
            _train(engine, head, steps, learning_rate, seed)
        yield
    finally:
        for parameter, old in before:
            parameter.data.copy_(old)


def _train(
    engine: Engine,
    head: Sequence[nn.Parameter],
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    available = len(engine.singles.calibration)
    # Adam's squares of 16-bit gradients would be zero.
    masters = [
        p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for p in head
    ]
    optimizer = torch.optim.Adam(masters, lr=learning_rate)
    with engine.ranks.raising_together():
        for positions in _draws(available, steps, seed):
            total = torch.zeros((), device=head[0].device)
            for batch in engine.batches(positions):
                total = total + engine.loss(batch).to(total.device)
            loss = total / len(positions)
            gradients = torch.autograd.grad(loss, head, allow_unused=True)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.to(master.dtype)
            optimizer.step()
            for parameter, master in zip(head, masters, strict=True):
                parameter.data.copy_(master)
    engine.ranks.copy_from_first(parameter.data for parameter in head)


def _draws(available: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of distinct samples, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    order: Tensor = torch.empty(0, dtype=torch.int64)
    size = min(_BATCH, available)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(available, generator=generator)
        yield sorted(order[:size].tolist())
        order = order[size:]
