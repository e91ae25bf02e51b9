"""GLUE's metrics, as a module of `evaluate` that needs no download."""

from typing import Any

import datasets
import evaluate
import numpy as np

__all__ = ["SCORES", "GlueMetric"]

Array = np.ndarray[Any, Any]

# What a task is ranked by (the paper's section 5.2); all others by accuracy.
SCORES = {
    "cola": "matthews_correlation",
    "stsb": "mean_correlation",
    "mrpc": "f1_and_accuracy",
    "qqp": "f1_and_accuracy",
}


class GlueMetric(evaluate.Metric):  # type: ignore[misc]
    """The metrics of one GLUE task; ``score`` is the one that it is ranked by.

    Args:
        config_name: The task, as ``"cola"``.
        **kwargs: What `evaluate.Metric` takes, as ``experiment_id`` and
            ``num_process``.
    """

    def __init__(self, config_name: str, **kwargs: Any) -> None:
        super().__init__(config_name=config_name, keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The metrics of GLUE (Wang et al., 2019).",
            citation="",
            inputs_description="Predicted labels, or scores for STS-B, and references.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(
        self, predictions: list[float], references: list[float]
    ) -> dict[str, float]:
        predicted, labels = np.asarray(predictions), np.asarray(references)
        found = _FAMILIES.get(self.config_name, _accuracy)(predicted, labels)
        return {**found, "score": found[SCORES.get(self.config_name, "accuracy")]}


def accuracy(predicted: Array, labels: Array) -> float:
    """Return the share of equal entries."""
    return float((predicted == labels).mean())


def correlation(predicted: Array, labels: Array) -> float:
    """Return Pearson's correlation, of binary labels Matthews'; 0 for a constant."""
    if predicted.std() == 0 or labels.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


def f1(predicted: Array, labels: Array) -> float:
    """Return F1 of label 1; 0 where neither has it."""
    positives = float(predicted.sum() + labels.sum())
    return 2 * float((predicted * labels).sum()) / max(1.0, positives)


def _accuracy(predicted: Array, labels: Array) -> dict[str, float]:
    return {"accuracy": accuracy(predicted, labels)}


def _matthews(predicted: Array, labels: Array) -> dict[str, float]:
    return {"matthews_correlation": correlation(predicted, labels)}


def _correlations(predicted: Array, labels: Array) -> dict[str, float]:
    pearson = correlation(predicted, labels)
    spearman = correlation(_ranks(predicted), _ranks(labels))
    mean = (pearson + spearman) / 2
    return {"pearson": pearson, "spearman": spearman, "mean_correlation": mean}


def _f1_and_accuracy(predicted: Array, labels: Array) -> dict[str, float]:
    found = {"f1": f1(predicted, labels), "accuracy": accuracy(predicted, labels)}
    return {**found, "f1_and_accuracy": (found["f1"] + found["accuracy"]) / 2}


def _ranks(values: Array) -> Array:
    """Return ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = np.cumsum(counts) - (counts - 1) / 2
    return ranks[inverse]


_FAMILIES = {
    "cola": _matthews,
    "stsb": _correlations,
    "mrpc": _f1_and_accuracy,
    "qqp": _f1_and_accuracy,
}
