"""Some samples through the model, together and alone: what is exact in batches."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

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
_LOOKED_AT = 64  # samples at a time that a pair is chosen from


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Args:
        padded: Whether padding is harmless: samples of different lengths may share a
            batch, and padding that came with them may be cut off.
        has_losses: Whether the losses of samples are known from a batch.
        alone: Parameters whose gradients in a batch are not those alone, or that the
            samples tried do not use.
        is_single: Whether no two samples that may share a batch were found to try; then
            none may.
        token_bytes: Bytes of the gradients of one token.
        sample_bytes: Bytes of the gradients of a sample that do not grow with tokens.
        activation_bytes: Bytes of what one token leaves for the backward pass.
    """

    padded: bool
    has_losses: bool
    alone: frozenset[int]
    is_single: bool = False
    token_bytes: float = 0.0
    sample_bytes: float = 0.0
    activation_bytes: float = 0.0

    @staticmethod
    def agreed(outcomes: Sequence["Outcome"]) -> "Outcome":
        """Return what holds for several processes, so that all make the same batches.

        Args:
            outcomes: What each of them found.
        """
        return Outcome(
            all(each.padded for each in outcomes),
            all(each.has_losses for each in outcomes),
            frozenset().union(*(each.alone for each in outcomes)),
            any(each.is_single for each in outcomes),
            max(each.token_bytes for each in outcomes),
            max(each.sample_bytes for each in outcomes),
            max(each.activation_bytes for each in outcomes),
        )


class Trial:
    """Compares batches with single samples.

    Args:
        together: What takes batches through the model.
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
                finite, or labels out of range, or if no sample has a label.
        """
        best: Outcome | None = None
        for padded in (True, False):
            pair, losses, norms = self._labelled_pair(samples, padded)
            if not pair:
                continue
            found = self._compare(pair, padded, losses, norms)
            if best is None or len(found.alone) < len(best.alone):
                best = found
            if len(best.alone) <= len(self._parts) // 4:
                break
        if best is None:
            raise ValueError(
                f"None of the {len(samples)} calibration samples has a label that "
                "counts: all are the ignored index. Check `labels` and the collate_fn."
            )
        return best

    def _labelled_pair(
        self, samples: Sequence[int], padded: bool
    ) -> tuple[list[Sample], Tensor, Tensor]:
        """Return a pair, its losses and its norms; gradients of zero tell nothing."""
        unlabelled = self._together.singles.unlabelled
        while True:
            pair = self._pair([s for s in samples if s not in unlabelled], padded)
            losses, norms = self._alone(pair)
            if unlabelled.isdisjoint(sample.position for sample in pair):
                return pair, losses, norms

    def _pair(self, samples: Sequence[int], padded: bool) -> list[Sample]:
        """Return samples that may share a batch, of different lengths if padded.

        Where equal shapes are meant and there are none, it is one sample.
        """
        if self._batch_size == 1:
            return [] if padded else self._loaded(samples[:1], padded)
        looked_at: list[Sample] = []
        step = max(1, ceil(len(samples) / _LOOKED_AT))
        for start in range(step):  # data may be sorted
            looked_at += self._loaded(samples[start::step], padded)
            pairs = _pairs(looked_at, padded, most=self._batch_size or 3)
            pair = max(pairs, key=_width, default=[])
            # Padding may do without a trial: equal shapes are always possible.
            if pair or padded:
                return pair
        return looked_at[:1]

    def _loaded(self, samples: Sequence[int], padded: bool) -> list[Sample]:
        return [self._together.singles.sample(s, padded) for s in samples]

    def _compare(
        self, pair: Sequence[Sample], padded: bool, losses: Tensor, expected: Tensor
    ) -> Outcome:
        try:
            return self._batched(pair, padded, losses, expected)
        except torch.OutOfMemoryError as problem:
            raise RuntimeError(
                f"{problem} That was a batch of {len(pair)} samples: pass a "
                "`memory_limit`, or Calibration(..., batch_size=1)."
            ) from problem
        except Exception as problem:  # whatever the model cannot do with a batch
            logger.debug("Samples cannot share a batch: %r", problem)
            return Outcome(padded, False, self._parts)

    def _alone(self, pair: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return losses ``[n]`` and squared norms ``[n, parameters]``, NaN for none."""
        norms = torch.full((len(pair), len(self._parts)), torch.nan).double()
        losses = torch.zeros(len(pair), dtype=torch.float64)
        for n, sample in enumerate(pair):
            for group in self._groups:
                losses[n], gradients = self._together.singles.gradients(
                    sample.position, group
                )
                for part, gradient in gradients.items():
                    norms[n, part] = Dense(gradient[None]).squared_norms((0,))[0]
                gradients.clear()  # before those of the next
        return losses, norms

    def _batched(
        self, pair: Sequence[Sample], padded: bool, losses: Tensor, expected: Tensor
    ) -> Outcome:
        gradients: dict[int, SampleGradients] = {}
        saved = _SavedBytes()
        with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            passed = self._together.run(
                pair, sorted(self._parts), gradients.__setitem__
            )
        if not _are_close(passed.loss.double().cpu(), losses.sum()):
            raise ValueError("the loss of a batch is not the sum of its samples'")
        norms = torch.zeros_like(expected)
        for part, each in gradients.items():
            norms[:, part] = each.squared_norms(range(len(pair)))
        tokens = size_of(pair)
        by_token, by_sample = _held_bytes(gradients.values())
        has_losses = passed.losses is not None and _are_close(
            passed.losses.double().cpu(), losses
        )
        return Outcome(
            padded,
            has_losses,
            self._differing(norms, expected) | passed.misfits,
            len(pair) == 1,
            by_token / tokens,
            by_sample / len(pair),
            saved.total / tokens,
        )

    def _differing(self, norms: Tensor, expected: Tensor) -> frozenset[int]:
        is_tried = ~expected.isnan().all(0)
        expected = expected.nan_to_num()
        parameters = self._together.singles.pool.parameters
        share = max(_AGREEMENT.get(p.dtype, _ROUGH_AGREEMENT) for p in parameters)
        noise = _NOISE * expected.amax(1, keepdim=True)
        agrees = (norms - expected).abs() <= share * expected + noise
        is_fine = agrees.all(0) & is_tried
        return frozenset((~is_fine).nonzero().flatten().tolist())


def _pairs(
    samples: Iterable[Sample], padded: bool, most: int
) -> Iterator[list[Sample]]:
    """Yield two samples of each kind; if padded three, the longest among them.

    What a model does with long samples only shows if they are on both sides of that
    length. Equal labels would hide that samples are exchanged for each other.
    """
    kinds: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: (s.length or 0, s.position)):
        key = (*sample.kind(padded), None if padded else sample.length)
        kinds.setdefault(key, []).append(sample)
    for alike in kinds.values():
        *others, last = alike
        others = [o for o in others if (o.length != last.length) == padded]
        if others:
            telling = (other for other in others if not _alike(other, last))
            first = next(telling, others[0])
            middle = others[len(others) // 2]
            is_between = (first.length or 0) < (middle.length or 0)
            yield [first, *[middle] * (is_between and most > 2), last]


def _width(pair: Sequence[Sample]) -> int:
    return max(sample.length or 0 for sample in pair)


def _alike(first: Sample, second: Sample) -> bool:
    """Return whether two samples have equal labels, as far as they can be told."""
    one, other = _labels(first), _labels(second)
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and torch.equal(one, other)


def _labels(sample: Sample) -> Any:
    if isinstance(sample.inputs, Mapping):
        return sample.inputs.get("labels")
    return tree_leaves(sample.inputs)[-1]


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


def _are_close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
