"""The score of a cell: by fine-tuning with the stock Trainer."""

import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset
from transformers import PrinterCallback, TrainingArguments

from peft_ird.search.outcome import Outcome, name_of
from peft_ird.search.stopping import BestWeights, PauseAt, checkpoint_in, named_metric
from peft_ird.search.trainer import CellTrainer
from peft_ird.selection.calibration import Calibration
from peft_ird.selection.randomness import own_randomness

__all__ = ["TrainerEvaluate"]

# Where files go and what is printed; none of it changes a result.
_INERT = (
    "dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm", "do_eval",
    "do_predict", "do_train", "hub_token", "load_best_model_at_end", "log_level",
    "logging_dir", "logging_first_step", "logging_steps", "logging_strategy",
    "metric_for_best_model", "output_dir", "project", "push_to_hub", "report_to",
    "run_name", "save_steps", "save_strategy", "save_total_limit",
)  # fmt: skip


@dataclass
class TrainerEvaluate:
    """Fine-tunes with the stock ``transformers.Trainer`` and scores.

    Cells are chosen by their score on a part of the training set that is held out:
    drawn by a seed, never trained on. ``eval_dataset`` is reported and chooses nothing.
    Entries should be selected on `training_rows`, which leaves the held-out part out.

    If ``training_args`` evaluate during training (``eval_strategy``), they do so on the
    held-out part, the weights that did best there are those that are scored and saved,
    and training stops early as in the paper.

    Every cell trains on one device and in a folder of its own inside
    ``training_args.output_dir``, which is deleted afterwards; the search keeps the
    adapter. ``bf16_full_eval`` and ``fp16_full_eval`` are off: they leave a model in 16
    bits, and cells are scored before they are trained and before they are saved.

    Args:
        training_args: The Trainer's arguments.
        train_dataset: The training set, with a length.
        eval_dataset: The data to report on; of several, by name, the mean is
            reported, as of MNLI's two, and each is among the outcome's metrics.
        compute_metrics: As for the Trainer; without it nothing but the loss is kept of
            an evaluation. One batch is scored before training, to see whether the
            metric is there; that it fails on so few rows does no harm.
        metric: The metric to choose by, with or without "eval_" in front.
        data_collator: As for the Trainer.
        processing_class: As for the Trainer, for example a tokenizer.
        preprocess_logits_for_metrics: As for the Trainer.
        held_out: Share of the training set in (0, 1), or number of its samples, that
            cells are chosen on. 0 or None chooses on ``eval_dataset``, so that what
            is reported is the best of several tries on the same data: optimistic.
        seed: Seed of that draw.
        patience: Evaluations without gain before training stops; None for never.
        threshold: What the metric must have passed before training stops early.
        greater_is_better: Whether the metric is to be large; score and report of one
            that is to be small are its negative. Default: what ``training_args`` say of
            it, else yes unless its name ends in "loss".

    Raises:
        ValueError: If there is nothing or more than one dataset to choose on, or
            ``held_out`` leaves nothing to train on.
    """

    training_args: TrainingArguments
    train_dataset: Any
    eval_dataset: Any = None
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    metric: str = "loss"
    data_collator: Callable[[list[Any]], Any] | None = None
    processing_class: Any = None
    held_out: float | int | None = 0.1
    seed: int = 0
    patience: int | None = 10
    threshold: float = 0.3
    greater_is_better: bool | None = None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        if not self.held_out and self.eval_dataset is None:
            raise ValueError(
                "There is nothing to choose cells on: pass `held_out`, a share of "
                "`train_dataset`, or an `eval_dataset`."
            )
        if not self.held_out and isinstance(self.eval_dataset, Mapping):
            raise ValueError(
                "Cells cannot be chosen on several datasets, but `eval_dataset` has "
                f"{', '.join(map(repr, self.eval_dataset))}. Pass one of them, or "
                "choose on a part of `train_dataset`, by `held_out`."
            )
        self.positions()

    @property
    def total_steps(self) -> int:
        """Steps of a full training."""
        args = self.training_args
        if args.max_steps > 0:
            return int(args.max_steps)
        share = len(self.positions()[0]) / args.per_device_train_batch_size
        batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
        updates = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        steps: int = math.ceil(args.num_train_epochs * updates)
        return steps

    def settings(self) -> dict[str, Any]:
        """Return what the outcome depends on, as far as it can be told."""
        plain = ("metric", "held_out", "seed", "patience", "threshold")
        arguments = self.training_args.to_dict()
        shown = {name: _digest(rows) for name, rows in self._shown().items()}
        parts = (
            "compute_metrics", "data_collator", "preprocess_logits_for_metrics",
            "processing_class",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in plain},
            **{name: name_of(getattr(self, name)) for name in parts},
            "greater_is_better": self._is_greater_better(),
            "train_data": Calibration(self.train_dataset).digest(),
            "eval_data": shown.get("", shown or None),
            "training_args": {k: v for k, v in arguments.items() if k not in _INERT},
        }

    @property
    def training_rows(self) -> Any:
        """The part of the training set that is trained on: the data to select on."""
        return _rows(self.train_dataset, self.positions()[0])

    def positions(self) -> tuple[list[int], list[int]]:
        """Return which samples are trained on, and which are held out.

        Raises:
            ValueError: If none would be left to train on, or none be held out.
        """
        available = len(self.train_dataset)
        if not self.held_out:
            return list(range(available)), []
        count: Any = self.held_out
        if not isinstance(count, Integral):
            count = max(1, round(float(count) * available)) if 0 < count < 1 else 0
        if not 0 < count < available:
            raise ValueError(
                "`held_out` must be a share in (0, 1) or a number of samples below "
                f"{available}, those of `train_dataset`; got {self.held_out}."
            )
        # Not the plain seed: calibration samples may be drawn by that one.
        digest = hashlib.sha256(f"held out {self.seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(available, generator=generator).tolist()
        return sorted(order[count:]), sorted(order[:count])

    def __call__(self, model: nn.Module) -> Outcome:
        """Train to the end, and score.

        Args:
            model: The model.
        """
        return self.advance(model, self.total_steps)

    def advance(
        self,
        model: nn.Module,
        until: int,
        resume_from: Path | None = None,
        save_to: Path | None = None,
    ) -> Outcome:
        """Train until so many steps are done in all, and score.

        Args:
            model: The model as it was before any training.
            until: Steps in all, at most ``total_steps``.
            resume_from: The folder that an earlier call was given as ``save_to``.
            save_to: Folder for the Trainer's checkpoint; None for none.

        Returns:
            The outcome; its metrics are those of the held-out part, and what is
            reported is scored at the end only.

        Raises:
            ValueError: If there is no checkpoint in ``resume_from``.
        """
        start = time.perf_counter()
        home = Path(self.training_args.output_dir)
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=str(home), prefix="cell-") as spare:
            checkpoint = resume_from and checkpoint_in(resume_from)
            best = BestWeights(
                self.metric, self._is_greater_better(), self.patience, self.threshold,
                checkpoint,
            )  # fmt: skip
            trainer = self._trainer(model, save_to or Path(spare), best)
            if checkpoint is None:
                self._check_metric(trainer)
            else:  # an evaluation at the start has been
                trainer.args.eval_on_start = False
            if save_to is not None or until < self.total_steps:
                trainer.add_callback(PauseAt(until))
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            best.restore(model)
            is_last = best.stopped or until >= self.total_steps
            return self._scored(trainer, best.stopped, is_last, start)

    def _scored(
        self, trainer: CellTrainer, stopped: bool, is_last: bool, start: float
    ) -> Outcome:
        steps = trainer.state.global_step
        metrics = trainer.scores(trainer.eval_dataset)
        sign = 1 if self._is_greater_better() else -1
        score = sign * named_metric(metrics, self.metric)
        reported: float | None = None if self.held_out else score
        # A metric that counts is still at chance when the loss tells cells apart.
        promise = -metrics["eval_loss"] if "eval_loss" in metrics else None
        if is_last and self.held_out and self._shown():
            found = {
                name: named_metric(trainer.scores(rows), self.metric)
                for name, rows in self._shown().items()
            }
            reported = sign * statistics.mean(found.values())
            metrics |= {f"{n}_{self.metric}": v for n, v in found.items() if n}
        seconds = time.perf_counter() - start
        return Outcome(score, reported, seconds, steps, metrics, stopped, promise)

    def _check_metric(self, trainer: CellTrainer) -> None:
        """Score a batch of each dataset, lest a wrong name is noticed after training.

        Raises:
            ValueError: If an evaluation does not return the metric.
        """
        size = trainer.args.eval_batch_size
        for rows in (trainer.eval_dataset, *self._shown().values()):
            if isinstance(rows, IterableDataset):
                continue  # a stream might not come twice
            few = _rows(rows, list(range(min(size, len(rows)))))
            with own_randomness(self.seed):
                found = trainer.tried_scores(few)
            if found is not None:
                named_metric(found, self.metric)

    def _shown(self) -> Mapping[str, Any]:
        """Return the datasets to report on, by name; a single one has none."""
        if self.eval_dataset is None or isinstance(self.eval_dataset, Mapping):
            return self.eval_dataset or {}
        return {"": self.eval_dataset}

    def _trainer(
        self, model: nn.Module, folder: Path, best: BestWeights
    ) -> CellTrainer:
        held_out = self.positions()[1]
        chosen_on = _rows(self.train_dataset, held_out) if held_out else None
        trainer = CellTrainer(
            model=model,
            args=self._arguments(folder),
            train_dataset=self.training_rows,
            eval_dataset=self.eval_dataset if chosen_on is None else chosen_on,
            compute_metrics=self.compute_metrics,
            data_collator=self.data_collator,
            processing_class=self.processing_class,
            preprocess_logits_for_metrics=self.preprocess_logits_for_metrics,
            callbacks=[best],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, folder: Path) -> TrainingArguments:
        """Return the arguments for one cell, made anew for this process's devices."""
        given = self.training_args
        arguments = replace(
            given,
            prediction_loss_only=(
                given.prediction_loss_only or self.compute_metrics is None
            ),
            ignore_data_skip=False,
            output_dir=str(folder),
            save_strategy="no",
            save_only_model=False,
            load_best_model_at_end=False,
            push_to_hub=False,
            bf16_full_eval=False,
            fp16_full_eval=False,
            disable_tqdm=True,  # a search has its own progress bar
        )
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    def _is_greater_better(self) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        args = self.training_args
        named = (args.metric_for_best_model or "").removeprefix("eval_")
        says = args.greater_is_better
        if says is not None and named == self.metric.removeprefix("eval_"):
            return bool(says)
        return not self.metric.endswith("loss")


def _digest(data: Any) -> str | None:
    """Return a hash of a dataset; of a stream, which might not come twice, its name."""
    return (
        name_of(data)
        if isinstance(data, IterableDataset)
        else Calibration(data).digest()
    )


def _rows(data: Any, positions: list[int]) -> Any:
    """Return some rows of a dataset, of its own kind where it can."""
    if hasattr(data, "select"):
        return data.select(positions)
    return Subset(data, positions)
