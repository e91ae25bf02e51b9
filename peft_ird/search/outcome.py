"""What the evaluation of a cell comes to, and what an evaluation is."""

import hashlib
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from peft_ird.options import as_plain
from peft_ird.selection.schedule import Cell

__all__ = ["CellRecord", "Evaluate", "Failure", "Outcome", "Resumable", "name_of"]

_PLAIN = (bool, int, float, str, bytes, Enum, PurePath, torch.dtype, torch.device)
_LONGEST = 200  # text that is told of an argument


@dataclass(frozen=True)
class Outcome:
    """How a cell did.

    Args:
        score: What cells are chosen by; higher is better.
        reported: The score on data that nothing was chosen on, to be reported; higher
            is better, too.
        seconds: Duration of training and scoring; the search measures it if it is None.
        steps: Training steps that the cell has had by now.
        metrics: Further numbers and texts; arrays and tensors are kept as lists.
        stopped: Whether training ended by itself, so that going on changes nothing.
        promise: What cells go on by where this is not the end of training, if not by
            ``score``; higher is better.

    Raises:
        ValueError: If one of these is no number.
    """

    score: float
    reported: float | None = None
    seconds: float | None = None
    steps: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    stopped: bool = False
    promise: float | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, kind(value))
        metrics = {name: _plain(value) for name, value in self.metrics.items()}
        object.__setattr__(self, "metrics", metrics)


_KINDS = {
    "score": float, "reported": float, "seconds": float, "steps": int, "stopped": bool,
    "promise": float,
}  # fmt: skip


def _plain(value: Any) -> Any:
    """Return a number or list in the place of a NumPy or torch one."""
    return value.tolist() if hasattr(value, "tolist") else value


def name_of(part: Any) -> str | None:
    """Return where a function, class or the class of an object is defined.

    Args:
        part: A function, partial function, class or object; None has no name. What a
            partial function was given is told as well.
    """
    if part is None:
        return None
    if isinstance(part, partial):
        given = [*map(_told, part.args)]
        given += [f"{name}={_told(v)}" for name, v in sorted(part.keywords.items())]
        return f"{name_of(part.func)}({', '.join(given)})"
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def _told(value: Any) -> str:
    """Return numbers, texts and trees of them; of others, where they are defined.

    What is long has a digest.
    """
    value = as_plain(value)
    if isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(_told, value))}]"
    elif isinstance(value, Mapping):
        pairs = sorted(f"{key!r}: {_told(each)}" for key, each in value.items())
        text = f"{{{', '.join(pairs)}}}"
    elif value is None or isinstance(value, _PLAIN):
        text = repr(value)
    else:
        text = str(name_of(value))
    is_long = len(text) > _LONGEST
    return hashlib.sha256(text.encode()).hexdigest()[:16] if is_long else text


class Evaluate(Protocol):
    """Trains a model with an adapter, or does not, and scores it.

    One with a method ``settings() -> dict`` (of what JSON holds) is compared with that
    of an earlier search in the same folder.
    """

    def __call__(self, model: nn.Module) -> float | Outcome:
        """Return a score, higher being better, or more than that.

        Args:
            model: The base model with the adapter, untrained.
        """


@runtime_checkable
class Resumable(Protocol):
    """An evaluation that can stop its training and go on later, as halving needs."""

    @property
    def total_steps(self) -> int:
        """Steps of a full training."""

    def __call__(self, model: nn.Module) -> float | Outcome:
        """Train to the end, and score.

        Args:
            model: The base model with the adapter, untrained.
        """

    def advance(
        self,
        model: nn.Module,
        until: int,
        resume_from: Path | None = None,
        save_to: Path | None = None,
    ) -> Outcome:
        """Train until so many steps are done in all, and score.

        The weights must be those of an uninterrupted training.

        Args:
            model: The model as it was before any training.
            until: Steps in all, at most ``total_steps``.
            resume_from: The folder that an earlier call was given as ``save_to``.
            save_to: Folder for what going on needs; None if nobody will.
        """


@dataclass(frozen=True)
class Failure:
    """The error that ended the evaluation of a cell."""

    type: str
    message: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Return what is to be kept of an exception.

        Args:
            error: The exception.
        """
        text = "".join(traceback.format_exception(error))
        return cls(type(error).__name__, str(error), text)


@dataclass(frozen=True)
class CellRecord:
    """A cell and what is known of it so far.

    Args:
        cell: Its samples and density.
        entries: Number of selected entries.
        outcomes: One for each rung that it reached; without halving there is one.
        failure: The error of its last training, if that failed.
    """

    cell: Cell
    entries: int
    outcomes: tuple[Outcome, ...] = ()
    failure: Failure | None = None

    @property
    def outcome(self) -> Outcome | None:
        """The last outcome."""
        return self.outcomes[-1] if self.outcomes else None

    @property
    def rung(self) -> int:
        """Number of rungs that were reached."""
        return len(self.outcomes)

    @property
    def seconds(self) -> float:
        """Duration of all its trainings."""
        return sum(outcome.seconds or 0.0 for outcome in self.outcomes)

    def promise(self, rung: int) -> tuple[float, float, int]:
        """Return what cells go on by, ordered as `merit` is.

        Args:
            rung: The rung that counts; it must have been reached.
        """
        outcome = self.outcomes[rung]
        value = outcome.score if outcome.promise is None else outcome.promise
        if math.isnan(value):  # it compares with nothing
            value = -math.inf
        return value, *self.merit(rung)[1:]

    def merit(self, rung: int = -1) -> tuple[float, float, int]:
        """Return what cells are ordered by: score, fewer entries, fewer samples.

        Args:
            rung: The rung whose score counts; it must have been reached.
        """
        score = self.outcomes[rung].score
        return score, -self.cell.density, -self.cell.num_samples
