"""What passes over samples may take of the memory."""

import os
from dataclasses import dataclass

import torch

from peft_ird.selection.gradients.ordered import bytes_per_entry
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.pool import Pool

__all__ = ["Limits"]

# Tokens in a batch: a CPU is busy with few, a GPU wants many.
_TOKENS = {"cpu": 2048, "cuda": 16384}
_MOST_KEPT = 8 << 30
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Limits:
    """What a pass may take.

    Args:
        tokens: Tokens in a batch, if ``batch_size`` is None.
        batch_size: Samples in a batch.
        accumulator_bytes: What sums over samples may take; the gradients of one sample
            are formed of as many entries at once.
        activation_bytes: What a batch may leave for its backward pass; None for any.
        cache_bytes: What kept gradients may take, over all processes.
    """

    tokens: int
    batch_size: int | None
    accumulator_bytes: int
    activation_bytes: int | None
    cache_bytes: int

    @classmethod
    def of(
        cls,
        pool: Pool,
        batch_size: int | None,
        memory_limit: int | None,
        ranks: Ranks | None = None,
    ) -> "Limits":
        """Divide the memory: half for sums, a quarter for a batch, the rest to keep.

        Args:
            pool: The candidate entries.
            batch_size: Samples in a batch; None for as many as there are tokens for.
            memory_limit: Bytes beyond the model; None for what is free on a GPU, and
                for no limit elsewhere, but that on kept gradients, a quarter of the
                device's memory and at most 8 GiB.
            ranks: The processes, which divide alike.

        Raises:
            ValueError: If ``memory_limit`` is too small for the largest parameter.
        """
        tokens = _TOKENS.get(pool.device.type, _TOKENS["cuda"])
        ranks = ranks or Ranks()
        if memory_limit is None and pool.device.type == "cuda":
            free = ranks.gather(torch.cuda.mem_get_info(pool.device)[0])
            sums, quarter = min(free) // 2, min(free) // 4
            return cls(tokens, batch_size, sums, quarter, min(_MOST_KEPT, quarter))
        if memory_limit is None:
            kept = min(_MOST_KEPT, min(ranks.gather(_memory())) // 4)
            return cls(tokens, batch_size, _UNLIMITED, None, kept)
        largest = max(pool.sizes) * bytes_per_entry(pool, ranks)
        if 2 * largest > memory_limit:
            name = pool.name(pool.sizes.index(max(pool.sizes)))
            raise ValueError(
                f"`memory_limit` must hold at least twice the {largest} bytes of "
                f"sums over samples for '{name}', got {memory_limit}. Raise it, or "
                "leave that module out with `exclude_modules`."
            )
        # Of several processes each keeps a part: so the same for any number of them.
        sums = min(len(pool) * pool.dtype.itemsize, memory_limit // 2)
        batch = memory_limit // 4
        kept = memory_limit - sums - batch
        return cls(tokens, batch_size, memory_limit // 2, batch, kept)


def _memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * _MOST_KEPT
