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
    if rows != recorder.size or given.get("weight") is not None or is_ignored:
        return None
    losses: Tensor = func(**{**given, "reduction": "none"})
    recorder.note_labels([True] * recorder.size)
    return losses.reshape(recorder.size, -1).mean(1)


def _piece_means(recorder: Recorder, func: Any, given: Mapping[str, Any]) -> Tensor:
    """Return the samples' losses, each a mean of its own; over no label it is zero."""
    pair = given["input"], given["target"]
    sources, targets = (t.split(t.shape[0] // recorder.size) for t in pair)
    ignored = given.get("ignore_index", torch.nan)  # no label is equal to NaN
    is_labelled = torch.stack([target.ne(ignored).any() for target in targets]).tolist()
    recorder.note_labels(is_labelled)
    return torch.stack(
        [
            func(**{**given, "input": x, "target": y,
                    "reduction": "mean" if is_so else "sum"})
            for x, y, is_so in zip(sources, targets, is_labelled, strict=True)
        ]
    )  # fmt: skip


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
