"""Labels: checked against the model, or drawn from it for the true Fisher."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_labels", "with_sampled_labels"]

_IGNORED = -100
_NOTHING_TO_DRAW = (
    "fisher='sampled' draws labels from the logits of a Hugging Face model and needs "
    "samples with `labels`; use fisher='empirical' here."
)


def check_labels(batch: Any, model: nn.Module, position: int) -> None:
    """Check a sample's labels before the model sees them.

    A label out of range ends a CUDA process; here it is an error that names the sample.

    Args:
        batch: A batch of one sample.
        model: A Hugging Face model; others are not checked.
        position: The sample's position, for the message.

    Raises:
        ValueError: If labels that the model takes are missing, or out of range.
    """
    config = getattr(model, "config", None)
    if not isinstance(batch, Mapping) or not hasattr(config, "num_labels"):
        return
    labels = batch.get("labels")
    if labels is None and "labels" in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"Calibration sample {position} has no `labels`; its fields are "
            f"{', '.join(map(str, batch))}. The default loss needs them; or pass "
            "Calibration(..., loss=...)."
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    count = _num_classes(model, batch)
    bad = labels[(labels != _IGNORED) & ((labels < 0) | (labels >= count))]
    if bad.numel():
        raise ValueError(
            f"The labels of calibration sample {position} must lie in [0, {count}) or "
            f"be {_IGNORED}, got {bad.flatten()[0].item()}. Is the model's "
            "`num_labels` that of the data?"
        )


def _num_classes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    config: Any = model.config
    labels, ids = batch["labels"], batch.get("input_ids")
    if ids is not None and ids.ndim == 3 and labels.ndim == 1:
        return ids.shape[1]  # one of several choices
    if labels.ndim < 2 or getattr(model, "loss_type", None) == "ForTokenClassification":
        regression = config.num_labels == 1
        return torch.iinfo(labels.dtype).max if regression else int(config.num_labels)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", torch.iinfo(labels.dtype).max))


def with_sampled_labels(
    batch: Any, model: Any, generator: torch.Generator
) -> Mapping[str, Any]:
    """Replace the labels by a draw from the model's own predictions.

    Classes are drawn at every position that has a label; a regression target is drawn
    around the prediction with the variance 1/2 that makes squared error a likelihood.

    Args:
        batch: A batch of one sample, a dictionary with ``labels`` or
            ``start_positions`` and ``end_positions``.
        model: A Hugging Face model.
        generator: Source of randomness, on the CPU.

    Returns:
        The batch with other labels.

    Raises:
        ValueError: If the batch has no such labels.
    """
    if not isinstance(batch, Mapping) or not hasattr(model, "config"):
        raise ValueError(_NOTHING_TO_DRAW)
    if "start_positions" in batch:
        with torch.no_grad():
            output = model(**batch)
        return {
            **batch,
            "start_positions": _draw(output.start_logits, generator),
            "end_positions": _draw(output.end_logits, generator),
        }
    if "labels" not in batch:
        raise ValueError(_NOTHING_TO_DRAW)
    drawn = dict(batch)
    if batch["labels"].ndim > 1 and "decoder_input_ids" not in batch:
        # The decoder reads the true prefix; only the targets are drawn.
        drawn |= _prefix(model, batch["labels"])
    with torch.no_grad():
        logits = model(**drawn).logits
    drawn["labels"] = _draw_labels(model, logits, batch["labels"], generator)
    return drawn


def _prefix(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return what a decoder reads where only labels are given."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return {"decoder_input_ids": shift(labels=labels)}
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None or not getattr(model.config, "is_encoder_decoder", False):
        return {}
    ids = labels.roll(1, -1).masked_fill(labels.roll(1, -1) == _IGNORED, start)
    ids[:, 0] = start
    return {"decoder_input_ids": ids}


def _draw_labels(
    model: Any, logits: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    problem = getattr(model.config, "problem_type", None)
    if problem == "regression" or logits.shape[-1] == 1:
        noise = torch.randn(labels.shape, generator=generator).to(labels.device)
        return logits.reshape(labels.shape).add(noise, alpha=0.5**0.5)
    if problem == "multi_label_classification":
        chance = torch.rand(labels.shape, generator=generator).to(labels.device)
        return (chance < logits.sigmoid()).to(labels.dtype)
    if logits.ndim == 3 and _predicts_next_token(model):
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"fisher='sampled' draws a label for each of the model's predictions, but "
            f"labels have the shape {tuple(labels.shape)}, logits "
            f"{tuple(logits.shape)}. Use fisher='empirical' here."
        )
    drawn = _draw(logits, generator)
    return torch.where(labels == _IGNORED, labels, drawn)


def _predicts_next_token(model: Any) -> bool:
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    shifted = {None, "ForCausalLM", "ForConditionalGeneration"}
    return getattr(model, "loss_type", None) in shifted


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    weights = logits.double().softmax(-1).cpu().flatten(0, -2)
    drawn = torch.multinomial(weights, 1, generator=generator)
    return drawn.view(logits.shape[:-1]).to(logits.device)
