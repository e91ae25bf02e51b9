"""Entries drawn by chance, the likelier the larger their scores."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from peft_ird.selection.settings import Settings

__all__ = ["Lots"]

_CHUNK = 1 << 17  # entries at a time: keys take no memory but their own
_NEVER = -1e9  # the key of what has no weight; chance decides between such
Stream = Iterable[tuple[int, Tensor]]


class Lots:
    r"""Turns scores s into keys whose extreme ones are a draw without replacement.

    Entries are drawn one after the other with probabilities proportional to
    :math:`s^{1/t}`: as in a race of exponential times, that is the order of
    :math:`s^{1/t} / e` with :math:`e \sim \mathrm{Exp}(1)` (Efraimidis and Spirakis,
    2006). Where the smallest are wanted, it is :math:`s^{-1/t}` and the order of
    :math:`s^{1/t} e`. Keys are the logarithms. An entry has the same e in every
    ranking, so that a ranking by the same scores gives the same entries.

    Args:
        sizes: Number of entries of each parameter.
        temperature: The t above, above 0.
        seed: Seed of the chance.
    """

    def __init__(self, sizes: Sequence[int], temperature: float, seed: int) -> None:
        self.sizes = sizes
        self.temperature = temperature
        self.seed = seed

    @classmethod
    def wanted(cls, sizes: Sequence[int], settings: Settings) -> "Lots | None":
        """Return the chance that rankings are to be mixed with, if any.

        Args:
            sizes: Number of entries of each parameter.
            settings: The options of the selection.
        """
        if settings.temperature == 0:
            return None
        return cls(sizes, settings.temperature, settings.seed)

    def keys(
        self,
        stream: Stream,
        positions: Sequence[Tensor] | None = None,
        largest: bool = True,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield keys in the place of scores.

        Args:
            stream: Parameter numbers and scores of their entries, not negative.
            positions: The entries that the scores are of, int64; None for all.
            largest: Whether the largest or the smallest keys are the draw.
        """
        for part, scores in stream:
            times = self._times(part)
            if positions is not None:
                times = times[positions[part].cpu()]
            keys = times.log_().to(scores.device)
            del times
            if largest:
                keys.neg_()
            room = keys.new_empty(min(_CHUNK, len(keys)))
            for some, of in zip(keys.split(_CHUNK), scores.split(_CHUNK), strict=True):
                weights = room[: len(of)].copy_(of).log_().div_(self.temperature)
                some.add_(weights.clamp_min_(_NEVER))
            del scores
            yield part, keys
            del keys

    def _times(self, part: int) -> Tensor:
        """Return an exponential time for every entry of a parameter, never zero."""
        name = f"{self.seed}/{part}".encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        chances = torch.rand(self.sizes[part], generator=generator, dtype=torch.float64)
        return chances.neg_().log1p_().clamp_max_(-1e-300).neg_()
