"""When a training stops: after evaluations without gain, or to go on later."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from peft_ird.sparse.storage import load_tensors, save_tensors

__all__ = ["BestWeights", "PauseAt", "checkpoint_in", "named_metric"]

_FILE = "best_weights.safetensors"


class BestWeights(TrainerCallback):  # type: ignore[misc]
    """Keeps the best weights that an evaluation saw, and stops when none gets better.

    That is the paper's early stopping: `patience` evaluations without gain, and a
    metric that has been better than `threshold`.

    Args:
        metric: Name of the metric.
        greater_is_better: Whether it is to be large.
        patience: Evaluations without gain before the end; None for no end.
        threshold: What the metric must have passed before training is stopped.
        resume_from: A checkpoint with the state of an earlier training.
    """

    def __init__(
        self,
        metric: str,
        greater_is_better: bool = True,
        patience: int | None = 10,
        threshold: float = 0.3,
        resume_from: Path | None = None,
    ) -> None:
        self.metric = metric
        self.patience = patience
        self.sign = 1 if greater_is_better else -1
        self.threshold = self.sign * threshold
        self.best = -math.inf
        self.waited = 0
        self.stopped = False
        self.weights: dict[str, Tensor] = {}
        if resume_from is not None and (resume_from / _FILE).is_file():
            self.weights, state = load_tensors(resume_from / _FILE)
            self.best, self.waited = state["best"], state["waited"]

    def see(self, value: float) -> bool:
        """Take note of a metric.

        Args:
            value: The metric.

        Returns:
            Whether it is better than all before.
        """
        value *= self.sign
        if value > self.best:
            self.best, self.waited = value, 0
            return True
        self.waited += 1
        has_waited = self.patience is not None and self.waited >= self.patience
        self.stopped = has_waited and self.best > self.threshold
        return False

    def on_evaluate(
        self,
        args: Any,  # noqa: ARG002 (the Trainer's signature)
        state: Any,  # noqa: ARG002
        control: Any,
        metrics: dict[str, float],
        model: nn.Module,
        **_: Any,
    ) -> Any:
        """Keep the weights if they are the best so far, or stop."""
        if self.see(named_metric(metrics, self.metric)):
            self.weights = {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        control.should_training_stop |= self.stopped
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Put what was seen into the checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.weights:
            facts = {"best": self.best, "waited": self.waited}
            save_tensors(folder / _FILE, self.weights, facts)

    def restore(self, model: nn.Module) -> None:
        """Give the model the best weights, if an evaluation saw any.

        Args:
            model: The model.
        """
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weights in self.weights.items():
                parameters[name].copy_(weights)


class PauseAt(TrainerCallback):  # type: ignore[misc]
    """Stops after so many steps and saves a checkpoint to go on from.

    The evaluations are those of an uninterrupted training: that at the end of an epoch
    comes before the checkpoint, and there is none in the middle of one.

    Args:
        step: The number of steps.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        """Stop at the step."""
        control.should_training_stop |= state.global_step >= self.step
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        """Save; the Trainer ends an epoch when it stops, wherever that is."""
        if state.global_step >= self.step:
            control.should_save = True
            control.should_evaluate &= float(state.epoch).is_integer()
        return control


def checkpoint_in(folder: Path) -> Path:
    """Return the checkpoint that a paused training left in its folder.

    Of several it is that of the most steps.

    Args:
        folder: The folder.

    Raises:
        ValueError: If there is none in it.
    """
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise ValueError(
            f"There is no checkpoint in '{folder}'. Pass the `save_to` of an earlier "
            "call. If the folder is one of a search, delete it and run the search "
            "again: the cell is then trained from the start."
        )
    return Path(found)


def named_metric(metrics: dict[str, float], name: str) -> float:
    """Return a metric by its name, with or without the Trainer's prefix.

    Args:
        metrics: What an evaluation returned.
        name: The name.

    Raises:
        ValueError: If there is none of that name.
    """
    short = name.removeprefix("eval_")
    found = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    if short not in found:
        raise ValueError(
            f"`metric` is '{name}', but the evaluation returned "
            f"{', '.join(sorted(found))}. Return it from `compute_metrics`, or name "
            "one of these."
        )
    return float(found[short])
