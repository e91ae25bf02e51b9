"""Scores that need no data: magnitude, chance and bias."""

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_ird.selection.pool import Pool

__all__ = ["METHODS", "NEEDS_DATA", "data_free_scores"]

NEEDS_DATA = ("ird", "reverse_ird", "fish", "gradient")
METHODS = (*NEEDS_DATA, "magnitude", "random", "bias")


def data_free_scores(
    method: str, pool: Pool, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the scores of a method that looks at no data.

    Args:
        method: ``"random"`` for uniform chance; ``"magnitude"`` for the absolute value
            of the weight, ``"bias"`` for that of biases alone.
        pool: The candidates.
        seed: Seed of the chance.

    Yields:
        A parameter's number, in order, and the scores of its entries, 1-D.

    Raises:
        ValueError: If a weight is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    for part, parameter in enumerate(pool.parameters):
        if method == "random":
            # In float32 a hundred million draws would tie in the millions.
            size = pool.sizes[part]
            yield part, torch.rand(size, generator=generator, dtype=torch.float64)
        elif method == "magnitude" or pool.is_bias(part):
            scores = parameter.detach().reshape(-1).to(pool.dtype).abs()
            if not bool(scores.isfinite().all()):
                raise ValueError(
                    f"'{pool.name(part)}' has weights that are not finite and cannot "
                    "be ranked. Is the checkpoint damaged?"
                )
            yield part, scores
