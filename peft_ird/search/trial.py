"""One training of one cell, with everything that another process needs for it."""

import copy
import hashlib
import logging
import math
import numbers
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_ird.config import IRDConfig
from peft_ird.search.folder import CellFolder
from peft_ird.search.outcome import Evaluate, Failure, Outcome, Resumable
from peft_ird.selection.randomness import own_randomness

__all__ = ["Trial", "UnsteadyModelError", "weight_digest"]

logger = logging.getLogger(__name__)


class UnsteadyModelError(ValueError):
    """The base model is not the same each time that it is made."""


@dataclass(frozen=True)
class Trial:
    """A training of a cell, up to a rung.

    Args:
        model_init: Makes the base model.
        evaluate: Trains and scores it.
        config: The configuration of the cell, without a selection.
        path: The folder of the cell.
        base: Digest of the base model's weights.
        rung: Number of the rung, from 0.
        until: Training steps in all by then; None for a whole training.
        is_last: Whether no rung comes after it.
        device: Where the model goes; None for where ``model_init`` puts it.
    """

    model_init: Callable[[], nn.Module]
    evaluate: Evaluate
    config: IRDConfig
    path: Path
    base: str
    rung: int = 0
    until: int | None = None
    is_last: bool = True
    device: str | None = None

    @property
    def folder(self) -> CellFolder:
        """The files of the cell."""
        return CellFolder(self.path)

    def run(self) -> None:
        """Train and score, and write down the outcome or the error.

        Raises:
            UnsteadyModelError: If the base model is not what it was before.
        """
        start = time.perf_counter()
        try:
            with own_randomness(self.config.seed):
                torch.manual_seed(self.config.seed)  # of GPUs, too
                outcome = self._evaluated(self._model())
        except UnsteadyModelError:
            raise
        except Exception as error:
            self.fail(error)
            return
        if outcome.seconds is None:
            outcome = replace(outcome, seconds=time.perf_counter() - start)
        self._write(outcome)

    def fail(self, error: BaseException) -> None:
        """Write down an error.

        Args:
            error: What went wrong.
        """
        folder = self.folder
        folder.write(replace(folder.read(), failure=Failure.of(error)))

    def _write(self, outcome: Outcome) -> None:
        folder = self.folder
        record = folder.read()
        outcomes = (*record.outcomes[: self.rung], outcome)
        folder.write(replace(record, outcomes=outcomes, failure=None))

    def _model(self) -> Any:
        base = self.model_init()
        if weight_digest(base) != self.base:
            raise UnsteadyModelError(
                "`model_init` must return the same weights each time, but they differ "
                "between two calls. A new head is drawn at random: call "
                "torch.manual_seed(0) inside `model_init` before the model is made."
            )
        if self.device is not None:
            base.to(self.device)
        config = copy.deepcopy(self.config)
        config.selection = self.folder.selection
        return get_peft_model(base, config)

    def _evaluated(self, model: Any) -> Outcome:
        """Evaluate the model, and keep the adapter if that has trained it."""
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().cpu().clone() for name, p in trained.items()}
        if self.until is None:
            outcome = as_outcome(self.evaluate(model))
        else:
            outcome = as_outcome(self._advanced(model, self.until))
        after = dict(model.named_parameters())
        if not trained.keys() <= after.keys():
            logger.warning(
                "`evaluate` has taken the adapter out of the model, so that the one "
                "that it trained cannot be kept in %s.", self.path,
            )  # fmt: skip
        elif any(
            not torch.equal(t, after[n].detach().cpu()) for n, t in before.items()
        ):
            _save(model, self.folder.adapter)
        return outcome

    def _advanced(self, model: nn.Module, until: int) -> Outcome:
        assert isinstance(self.evaluate, Resumable)
        source = self.folder.rung(self.rung - 1) if self.rung else None
        target = None if self.is_last else self.folder.rung(self.rung)
        if target is not None and target.exists():  # of a training cut short
            shutil.rmtree(target)
        if source is not None and not source.is_dir():
            logger.warning("%s is gone; its cell is trained anew.", source)
            source = None
        return self.evaluate.advance(model, until, source, target)


def as_outcome(result: Any) -> Outcome:
    """Return what an evaluation returned as an `Outcome`.

    Args:
        result: An outcome or a number.

    Raises:
        TypeError: If it is something else.
        ValueError: If the score is not finite.
    """
    outcome = result
    if not isinstance(outcome, Outcome):
        is_scalar = isinstance(result, Tensor) and result.numel() == 1
        if not is_scalar and not isinstance(result, numbers.Real):
            raise TypeError(
                "`evaluate` must return a number or an Outcome, got "
                f"{type(result).__name__}."
            )
        outcome = Outcome(float(result))
    if not math.isfinite(outcome.score):
        raise ValueError(
            f"The score is {outcome.score}. Did the training diverge? Lower the "
            "learning rate."
        )
    return outcome


def weight_digest(model: nn.Module) -> str:
    """Return a fingerprint of all weights and buffers of a model.

    Args:
        model: The model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()


def _save(model: Any, path: Path) -> None:
    """Save an adapter beside an older one, which it then replaces."""
    fresh = path.with_name(f"{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(str(fresh))
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)
