"""Means over a batch that a loss takes, replaced by the sum of the samples' own means.

So each sample counts as it would alone, whatever the number of its tokens. One without
any label counts as zero, as in the mean over a batch that others have labels in.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ird.selection.gradients.recorder import Recorder
from peft_ird.selection.gradients.signatures import bind

__all__ = ["LOSSES"]

# Their means are over all elements, whatever these weigh.
_OVER_ALL = {F.binary_cross_entropy, F.binary_cross_entropy_with_logits}


def _mean_loss(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Replace a mean over the batch by the sum of the means over each sample."""
    given = bind(func, args, kwargs)
    source, target = given["input"], given["target"]
    is_mean = given["reduction"] == "mean" and given["size_average"] is None
    if not is_mean or given["reduce"] is not None:
        return NotImplemented
    if not (recorder.splits(source) and recorder.splits(target)):
        recorder.mixes_losses |= recorder.size > 1
        return NotImplemented
    losses = _row_means(recorder, func, given)
    if losses is None:
        losses = _piece_means(recorder, func, given)
    recorder.losses.append(losses.detach())
    return losses.sum()


def _row_means(
    recorder: Recorder, func: Any, given: Mapping[str, Any]
) -> Tensor | None:
    """Return the samples' losses where each has one row and rows count alike."""
    target = given["target"]
    is_ignored = "ignore_index" in given and (target == given["ignore_index"]).any()
    rows = given["input"].shape[0]
    has_weight = given.get("weight") is not None
    is_weighted = has_weight and func not in _OVER_ALL
    if rows != recorder.size or is_weighted or is_ignored:
        return None
    losses: Tensor = func(**{**given, "reduction": "none"})
    recorder.note_labels([True] * recorder.size)
    return losses.reshape(recorder.size, -1).mean(1)


def _piece_means(recorder: Recorder, func: Any, given: Mapping[str, Any]) -> Tensor:
    """Return the samples' losses, each a mean of its own; over no label it is zero."""
    pair = given["input"], given["target"]
    sources, targets = (t.split(t.shape[0] // recorder.size) for t in pair)
    counts = [_counted(given, target).any() for target in targets]
    is_labelled = torch.stack(counts).tolist()
    recorder.note_labels(is_labelled)
    return torch.stack(
        [
            func(**{**given, "input": x, "target": y,
                    "reduction": "mean" if is_so else "sum"})
            for x, y, is_so in zip(sources, targets, is_labelled, strict=True)
        ]
    )  # fmt: skip


def _counted(given: Mapping[str, Any], target: Tensor) -> Tensor:
    """Return which labels a mean is over: those neither ignored nor of weight zero."""
    ignored, weight = given.get("ignore_index"), given.get("weight")
    if ignored is None or target.is_floating_point():
        return torch.ones_like(target, dtype=torch.bool)
    is_counted = target.ne(ignored)
    if weight is not None:
        is_counted &= weight[target.where(is_counted, 0)].ne(0)
    return is_counted


LOSSES: dict[Any, Callable[[Recorder, Any, Any, Any], Any]] = dict.fromkeys(
    [
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cross_entropy,
        F.l1_loss,
        F.mse_loss,
        F.nll_loss,
        F.smooth_l1_loss,
    ],
    _mean_loss,
)
