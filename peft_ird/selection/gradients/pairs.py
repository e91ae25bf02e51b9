"""Which samples tell best whether a batch is exact."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from peft_ird.selection.gradients.batching import Sample

__all__ = ["telling_pairs"]

_KINDS = 3  # of samples, by their fields, that are tried


def telling_pairs(
    samples: Iterable[Sample], padded: bool, most: int
) -> list[list[Sample]]:
    """Return a pair of each kind of samples that may share a batch.

    What a model does with long samples only shows if they are on both sides of that
    length. Equal labels would hide that samples are exchanged for each other.

    Args:
        samples: The samples to choose from.
        padded: Whether samples of different lengths may share a batch.
        most: Samples in a pair, at least 2; more than 3 are not needed.

    Returns:
        Two samples each or, if padded, three, the longest of their kind among them; of
        the three widest kinds at most. None if ``padded`` and all are equally long.
    """
    found: dict[tuple[Any, ...], list[Sample]] = {}
    for pair in sorted(_pairs(samples, padded, most), key=_width):
        found[pair[0].kind(padded=True)] = pair  # fields decide, not lengths
    if padded and not any(map(_is_ragged, found.values())):
        return []
    return sorted(found.values(), key=_width)[-_KINDS:]


def _pairs(
    samples: Iterable[Sample], padded: bool, most: int
) -> Iterator[list[Sample]]:
    kinds: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: (s.length or 0, s.position)):
        key = (*sample.kind(padded), None if padded else sample.length)
        kinds.setdefault(key, []).append(sample)
    for alike in kinds.values():
        *others, last = alike
        if padded:
            others = [o for o in others if o.length != last.length] or others
        if others:
            telling = (other for other in others if not _alike(other, last))
            first = next(telling, others[0])
            middle = others[len(others) // 2]
            is_between = (first.length or 0) < (middle.length or 0)
            yield [first, *[middle] * (is_between and most > 2), last]


def _is_ragged(pair: Sequence[Sample]) -> bool:
    return len({sample.length for sample in pair}) > 1


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
