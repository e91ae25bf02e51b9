"""Batches of calibration samples: sorted by length, cut to it, padded if need be."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

__all__ = ["Sample", "cut", "plan", "rows_of_batch", "stack", "widths"]

# What a field is padded with on the right; other fields must be of equal shape.
_PADDING = {
    "attention_mask": 0,
    "decoder_attention_mask": 0,
    "decoder_input_ids": None,  # the model's padding token
    "global_attention_mask": 0,
    "input_ids": None,
    "inputs_embeds": 0,
    "labels": -100,
    "position_ids": 0,
    "token_type_ids": 0,
}
_COUNTED = ("decoder_input_ids", "input_ids", "inputs_embeds", "labels")
# Samples in a batch where there is nothing to measure their length by.
_WITHOUT_LENGTH = 16
_MOST = 256


class Sample:
    """One sample as a batch of one, and what decides with which others it may go.

    Args:
        position: Its position in the calibration data.
        inputs: The batch of one: a mapping, tuple or tensor.
    """

    def __init__(self, position: int, inputs: Any) -> None:
        self.position = position
        self.inputs = inputs
        self.length = _length(inputs)
        self.tokens = None if self.length is None else _tokens(inputs)

    @property
    def unmasked(self) -> int | None:
        """Tokens that an attention mask does not hide; None if there are no tokens."""
        mask = None if self.length is None else self.inputs.get("attention_mask")
        return int(mask.ne(0).sum()) if isinstance(mask, Tensor) else self.tokens

    def kind(self, padded: bool) -> tuple[Any, ...]:
        """Return what must be equal for two samples to share a batch."""
        padded = padded and not _may_be_packed(self.inputs)
        if not isinstance(self.inputs, Mapping):
            leaves, spec = tree_flatten(self.inputs)
            return (str(spec), *map(_form, leaves))
        return tuple(
            (name, _form(value, _is_ragged(name, value) and padded))
            for name, value in sorted(self.inputs.items())
        )


def _length(inputs: Any) -> int | None:
    if isinstance(inputs, Mapping):
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(inputs.get(name), Tensor) and inputs[name].ndim > 1:
                return int(inputs[name].shape[1])
    return None


def _tokens(inputs: Any) -> int | None:
    """Return the tokens of a sample: of all choices, or of the longer of two texts."""
    if not isinstance(inputs, Mapping):
        return None
    shapes = [
        value.shape[1:-1] if name == "inputs_embeds" else value.shape[1:]
        for name, value in inputs.items()
        if name in _COUNTED and isinstance(value, Tensor) and value.ndim > 1
    ]
    return max((shape.numel() for shape in shapes), default=None)


def _may_be_packed(inputs: Any) -> bool:
    """Return whether a mask would hide where one text ends and the next begins."""
    if not isinstance(inputs, Mapping):
        return False
    return "position_ids" in inputs and "attention_mask" not in inputs


def _is_ragged(name: str, value: Any) -> bool:
    return name in _PADDING and isinstance(value, Tensor) and value.ndim > 1


def _form(value: Any, ragged: bool = False) -> Any:
    """Return dtype and shape; what has no row of its own must be the same object."""
    if not isinstance(value, Tensor):
        plain = (isinstance(v, str | int | float | None) for v in tree_leaves(value))
        return repr(value) if all(plain) else id(value)
    if value.ndim == 0 or value.shape[0] != 1:
        return id(value)
    shape: tuple[int | None, ...] = tuple(value.shape)
    shape = (1, None, *shape[2:]) if ragged else shape
    return value.dtype, shape


def cut(inputs: Any) -> Any:
    """Cut padding off the right of a batch of one, as far as nothing there counts.

    Args:
        inputs: A batch of one.

    Returns:
        The batch without columns that the attention mask hides and that carry no label.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != 1:
        return inputs
    counts = mask[0].ne(0)
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        counts = counts | labels[0].ne(-100)
    width = mask.shape[1]
    needed = width - int(counts.flip(0).to(torch.uint8).argmax())
    if needed == width or not bool(counts.any()):
        return inputs

    def shorter(name: str, value: Any) -> Any:
        fits = _is_ragged(name, value) and value.shape[1] == width
        return value[:, :needed] if fits and not name.startswith("decoder") else value

    return {name: shorter(name, value) for name, value in inputs.items()}


def plan(
    samples: Sequence[Sample], tokens: int, batch_size: int | None, padded: bool
) -> list[list[Sample]]:
    """Divide samples into batches; the division depends on nothing but the arguments.

    Args:
        samples: The samples, in any order.
        tokens: Tokens in a batch, padding included, or samples without a length, if
            ``batch_size`` is None.
        batch_size: Samples in a batch.
        padded: Whether samples of different lengths may share a batch.

    Returns:
        Batches of at least one sample, the longest samples first.
    """
    kinds: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: (-(s.tokens or 0), s.position)):
        kinds.setdefault(sample.kind(padded), []).append(sample)
    batches = []
    for alike in kinds.values():
        start = 0
        while start < len(alike):
            longest = alike[start].tokens
            size = batch_size or min(_WITHOUT_LENGTH, max(1, tokens))
            if batch_size is None and longest is not None:
                size = min(_MOST, max(1, tokens // max(1, longest)))
            batches.append(alike[start : start + size])
            start += size
    return batches


def stack(batch: Sequence[Sample], pad_token: int, device: torch.device) -> Any:
    """Join batches of one into one batch, padded on the right, on a device.

    Args:
        batch: Samples that may go together.
        pad_token: The model's padding token.
        device: Where the batch is for.
    """
    first = batch[0].inputs
    if isinstance(first, Mapping):
        joined: Any = {
            name: _join(name, [sample.inputs[name] for sample in batch], pad_token)
            for name in first
        }
        if len({sample.length for sample in batch}) > 1:
            joined.setdefault("attention_mask", _mask(batch))
    else:
        spec = tree_flatten(first)[1]
        columns = zip(*(tree_flatten(s.inputs)[0] for s in batch), strict=True)
        joined = tree_unflatten([_join("", list(c), pad_token) for c in columns], spec)
    return tree_map_only(Tensor, lambda t: t.to(device), joined)


def widths(inputs: Any) -> set[int]:
    """Return how many rows a sample of a batch has where the batch is flattened.

    Args:
        inputs: A batch; predictions of the next token may be one row shorter.
    """
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    found = {leaf.shape[1] for leaf in leaves if leaf.ndim > 1}
    return found | {width - 1 for width in found}


def rows_of_batch(inputs: Any) -> int | None:
    """Return the rows that a model makes of a batch of choices; None without choices.

    Args:
        inputs: A batch.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if isinstance(ids, Tensor) and ids.ndim == 3:
        return ids.shape[:2].numel()
    return None


def _join(name: str, values: list[Any], pad_token: int) -> Any:
    first = values[0]
    if not isinstance(first, Tensor) or first.ndim == 0 or first.shape[0] != 1:
        return first
    if _is_ragged(name, first):
        fill = _PADDING[name]
        width = max(value.shape[1] for value in values)
        values = [_pad(v, width, pad_token if fill is None else fill) for v in values]
    return torch.cat(values)


def _pad(value: Tensor, width: int, fill: int) -> Tensor:
    missing = width - value.shape[1]
    if not missing:
        return value
    shape = (value.shape[0], missing, *value.shape[2:])
    return torch.cat([value, value.new_full(shape, fill)], 1)


def _mask(batch: Sequence[Sample]) -> Tensor:
    lengths = torch.tensor([sample.length for sample in batch])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()
