"""The report of `causal_lm.py`: what one adapter gave, and runs beside each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Run", "format_runs"]


@dataclass(frozen=True)
class Run:
    """What training one adapter gave."""

    method: str
    parameters: int
    perplexity_before: float
    perplexity_after: float
    perplexity_merged: float
    text_before: str
    text_after: str
    selection_seconds: float
    training_seconds: float
    adapter_bytes: int
    reloaded_is_equal: bool
    merged_is_equal: bool


def format_runs(runs: Sequence[Run]) -> str:
    """Lay the runs out beside each other, and their texts below."""
    lines = [f"{'':<24}" + "".join(f"{run.method:>12}" for run in runs)]
    for title, cell in ROWS.items():
        lines.append(f"{title:<24}" + "".join(f"{cell(run):>12}" for run in runs))
    lines.append(f"\nbefore: {runs[0].text_before}")
    lines += [f"{run.method}: {run.text_after}" for run in runs]
    return "\n".join(lines)


ROWS: dict[str, Callable[[Run], str]] = {
    "trained parameters": lambda run: f"{run.parameters:,}",
    "perplexity before": lambda run: f"{run.perplexity_before:.3f}",
    "perplexity after": lambda run: f"{run.perplexity_after:.3f}",
    "  of the merged model": lambda run: f"{run.perplexity_merged:.3f}",
    "seconds to select": lambda run: f"{run.selection_seconds:.1f}",
    "seconds to train": lambda run: f"{run.training_seconds:.1f}",
    "adapter, bytes": lambda run: f"{run.adapter_bytes:,}",
    "reloaded: same text": lambda run: str(run.reloaded_is_equal),
    "merged: same text": lambda run: str(run.merged_is_equal),
}
