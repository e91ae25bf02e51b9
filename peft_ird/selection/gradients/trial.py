"""Two samples through the model, together and alone: what is exact in batches."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peft_ird.selection.gradients.batching import Sample
from peft_ird.selection.gradients.dense import Dense
from peft_ird.selection.gradients.forms import SampleGradients
from peft_ird.selection.gradients.together import Together, size_of

__all__ = ["Outcome", "Trial"]

logger = logging.getLogger(__name__)

# Relative difference of squared norms up to which batch and single sample agree. What
# a norm may be off on top is that share of the largest norm of any parameter.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUGH_AGREEMENT = 0.2
_NOISE = 1e-8
_LOOKED_AT = 64  # samples that a pair is chosen from


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Args:
        padded: Whether padding is harmless: samples of different lengths may share a
            batch, and padding that came with them may be cut off.
        is_mean: Whether a custom loss is the mean over the batch.
        alone: Parameters whose gradients in a batch are not those alone.
        token_bytes: Bytes of the gradients of one token.
        sample_bytes: Bytes of the gradients of a sample that do not grow with tokens.
        activation_bytes: Bytes of what one token leaves for the backward pass.
    """

    padded: bool
    is_mean: bool
    alone: frozenset[int]
    token_bytes: float = 0.0
    sample_bytes: float = 0.0
    activation_bytes: float = 0.0


class Trial:
    """Compares batches with single samples.

    Args:
        together: What takes batches through the model; its ``is_mean`` is set.
        groups: Numbers of all parameters; gradients of a group are formed at once.
        batch_size: Samples in a batch, if it is given.
    """

    def __init__(
        self,
        together: Together,
        groups: Sequence[Sequence[int]],
        batch_size: int | None,
    ) -> None:
        self._together = together
        self._groups = groups
        self._batch_size = batch_size
        self._parts = frozenset(part for group in groups for part in group)

    def outcome(self, samples: Sequence[int]) -> Outcome:
        """Try padded batches and, if they are not exact, batches of equal shapes.

        Args:
            samples: Positions in the calibration data.

        Raises:
            ValueError: If a sample of the pair has a loss or gradient that is not
                finite, or labels out of range.
        """
        best: Outcome | None = None
        for padded in (True, False):
            pair = self._pair(samples, padded)
            if not pair:
                continue
            found = self._compare(pair, padded)
            if best is None or len(found.alone) < len(best.alone):
                best = found
            if len(best.alone) <= len(self._parts) // 4:
                break
        assert best is not None
        self._together.is_mean = best.is_mean
        return best

    def _pair(self, samples: Sequence[int], padded: bool) -> list[Sample]:
        """Return two samples that may share a batch, of different lengths if padded."""
        load = self._together.singles.sample
        loaded = [load(position, padded) for position in samples[:_LOOKED_AT]]
        loaded.sort(key=lambda s: (s.length or 0, s.position))
        if self._batch_size != 1:
            for first, second in pairwise(loaded):
                is_ragged = first.length != second.length
                if first.kind(padded) == second.kind(padded) and is_ragged == padded:
                    return [first, second]
        return [] if padded else loaded[:1]

    def _compare(self, pair: Sequence[Sample], padded: bool) -> Outcome:
        loss, expected = self._alone(pair)
        try:
            return self._batched(pair, padded, loss, expected)
        except Exception as problem:  # whatever the model cannot do with a batch
            logger.debug("Samples cannot share a batch: %r", problem)
            return Outcome(padded, False, self._parts)

    def _alone(self, pair: Sequence[Sample]) -> tuple[float, Tensor]:
        """Return the sum of losses, and squared norms. Shape ``[n, parameters]``."""
        norms = torch.zeros(len(pair), len(self._parts), dtype=torch.float64)
        losses = torch.zeros(len(pair))
        for n, sample in enumerate(pair):
            for group in self._groups:
                losses[n], gradients = self._together.singles.gradients(
                    sample.position, group
                )
                for part, gradient in gradients.items():
                    norms[n, part] = gradient.double().square().sum()
        return losses.sum().item(), norms

    def _batched(
        self, pair: Sequence[Sample], padded: bool, loss: float, expected: Tensor
    ) -> Outcome:
        together = self._together
        together.is_mean = False
        found = together.loss(pair).item()
        if not _is_close(found, loss):
            together.is_mean = True
            if not _is_close(found * len(pair), loss):
                raise ValueError("the loss of a batch is no sum of its samples'")
        gradients: dict[int, SampleGradients] = {}
        saved = _SavedBytes()
        with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            together.run(pair, sorted(self._parts), gradients.__setitem__)
        norms = torch.zeros_like(expected)
        for part, each in gradients.items():
            for n in range(len(pair)):
                norms[n, part] = each.squared_norm(n)
        tokens = size_of(pair)
        by_token, by_sample = _held_bytes(gradients.values())
        return Outcome(
            padded,
            together.is_mean,
            self._differing(norms, expected),
            by_token / tokens,
            by_sample / len(pair),
            saved.total / tokens,
        )

    def _differing(self, norms: Tensor, expected: Tensor) -> frozenset[int]:
        parameters = self._together.singles.pool.parameters
        share = max(_AGREEMENT.get(p.dtype, _ROUGH_AGREEMENT) for p in parameters)
        noise = _NOISE * expected.amax(1, keepdim=True)
        agrees = (norms - expected).abs() <= share * expected + noise
        return frozenset((~agrees.all(0)).nonzero().flatten().tolist())


def _held_bytes(gradients: Iterable[SampleGradients]) -> tuple[int, int]:
    """Return the bytes that grow with the tokens, and those of dense gradients."""
    by_token: dict[int, int] = {}  # several parameters may share an input
    by_sample = 0
    for each in gradients:
        if isinstance(each, Dense):
            by_sample += sum(t.nbytes for t in each.tensors())
        else:
            by_token.update((t.data_ptr(), t.nbytes) for t in each.tensors())
    return sum(by_token.values()), by_sample


class _SavedBytes:
    """Counts what a forward pass saves for the backward pass."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in self._seen:
            self._seen.add(tensor.data_ptr())
            self.total += tensor.nbytes
        return tensor


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-3 * abs(b) + 1e-6
