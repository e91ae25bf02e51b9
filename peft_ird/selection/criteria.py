"""Scores that need no data: magnitude, chance and bias."""

import torch
from torch import Tensor

from peft_ird.selection.pool import Pool

__all__ = ["METHODS", "NEEDS_DATA", "data_free_scores"]

NEEDS_DATA = ("ird", "reverse_ird", "fish", "gradient")
METHODS = (*NEEDS_DATA, "magnitude", "random", "bias")


def data_free_scores(method: str, pool: Pool, seed: int) -> Tensor:
    """Return the scores of a method that looks at no data.

    Args:
        method: ``"random"`` for uniform chance; ``"magnitude"`` and ``"bias"`` for the
            absolute value of the weight.
        pool: The candidates.
        seed: Seed of the chance.

    Returns:
        Flat scores. Shape ``[len(pool)]``.

    Raises:
        ValueError: If a weight is not finite.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        # In float32 a hundred million draws would tie in the millions.
        return torch.rand(len(pool), generator=generator, dtype=torch.float64)
    scores = pool.zeros()
    for view, parameter, name in zip(
        pool.views(scores), pool.parameters, pool.names, strict=True
    ):
        view.copy_(parameter.detach().reshape(-1).abs())
        if not bool(view.isfinite().all()):
            raise ValueError(
                f"'{'.'.join(name)}' has weights that are not finite and cannot be "
                "ranked. Is the checkpoint damaged?"
            )
    return scores
