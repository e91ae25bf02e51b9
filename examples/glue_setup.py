"""What fine-tuning on a GLUE task has whatever the method: data, model, Trainer."""

import argparse
import math
from typing import Any

import datasets
import torch
from glue import GLUE, GlueTask
from metrics import SCORES, GlueMetric
from tasks import load_tokenizer, quieten_libraries
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

__all__ = ["Setup", "finite"]

Rows = datasets.Dataset
_METRICS = {"score", "accuracy", "f1", "pearson", "spearman", "loss", *SCORES.values()}


class Setup:
    """What a run has whatever its method: the data, tokenised, and loading.

    Args:
        options: The options of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        quieten_libraries()
        torch.set_float32_matmul_precision(options.precision)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.task: GlueTask = GLUE[options.task]
        self.tokenizer = load_tokenizer(options.model)
        config = AutoConfig.from_pretrained(options.model)
        self.is_decoder = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        longest = getattr(config, "max_position_embeddings", self.task.max_length)
        self.max_length = min(options.max_length or self.task.max_length, longest)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.metric = GlueMetric(self.task.name)
        self.train, self.held_out = self._training_rows()
        self.held_out = by_length(self.held_out)
        self.evaluations = {
            split: by_length(self._encoded(self.task.read(split, options.data_dir)))
            for split in self.task.evaluations
        }

    def _training_rows(self) -> tuple[Rows, Rows]:
        """Draw the rows to train on, and others of the training set to score."""
        options = self.options
        rows = self.task.read("train", options.data_dir).shuffle(seed=options.seed)
        held_out = min(options.held_out, len(rows) // 5)
        wanted = len(rows) - held_out
        if options.max_train:
            wanted = min(wanted, options.max_train)
        drawn = rows.select(range(wanted + held_out))
        encoded = self._encoded(drawn)
        last = [*range(wanted, wanted + held_out)]
        return encoded.select(range(wanted)), encoded.select(last)

    def _encoded(self, rows: Rows) -> Rows:
        return self.task.encode(rows, self.tokenizer, self.is_decoder, self.max_length)

    def load_model(self) -> nn.Module:
        """Load the pretrained model, with a new head that depends on the seed only."""
        set_seed(self.options.seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            self.options.model,
            num_labels=self.task.num_labels,
            pad_token_id=self.tokenizer.pad_token_id,
            dtype=torch.float32,
        )
        return model

    def trainer(self, model: nn.Module, groups: Any = None) -> Trainer:
        """Return the stock Trainer.

        Args:
            model: What is trained.
            groups: Groups of parameters for the optimizer; None for the Trainer's.
        """
        options = self.options
        optimizer = None
        if groups is not None:
            optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
        trainer = Trainer(
            model,
            self.arguments(),
            self.collate,
            self.train,
            compute_metrics=self.metrics,
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def arguments(self) -> TrainingArguments:
        """Return what is the same for all methods but the learning rate."""
        options = self.options
        return TrainingArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.epochs,
            learning_rate=options.lr,
            warmup_steps=0.06,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            seed=options.seed,
            label_names=["labels"],
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def metrics(self, outcome: EvalPrediction) -> dict[str, float]:
        """Return the task's metrics."""
        logits = outcome.predictions
        is_regression = self.task.num_labels == 1
        predicted = logits[:, 0] if is_regression else logits.argmax(-1)
        found = self.metric.compute(predictions=predicted, references=outcome.label_ids)
        return {name: finite(value) for name, value in found.items()}

    def scores(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """Return the metrics on the held-out rows and on every validation split."""
        rows = {"held_out": self.held_out, **self.evaluations}
        return {
            name: {
                key.removeprefix("eval_"): value
                for key, value in trainer.evaluate(part).items()
                if key.removeprefix("eval_") in _METRICS
            }
            for name, part in rows.items()
            if len(part)
        }


def finite(score: float) -> float:
    """Return a score, or the worst of correlations where training diverged."""
    return float(score) if math.isfinite(score) else -1.0


def by_length(rows: Rows) -> Rows:
    """Sort rows, so that batches have little padding; their order changes no score."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
