"""The quickstart's report: what one training run gave, and runs beside each other."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from peft_ird.selection.places import Place

if sys.platform != "win32":
    import resource

__all__ = ["Run", "format_table", "peak_memory"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Run:
    """What training one adapter gave."""

    method: str
    metric: str
    before: float
    after: float
    adapter_parameters: int
    head_parameters: int
    selection_seconds: float
    training_seconds: float
    peak_bytes: int | None
    adapter: str
    adapter_bytes: int
    places: dict[str, Place]
    logits: Array

    def facts(self) -> dict[str, Any]:
        """Return everything that JSON can hold."""
        return {k: v for k, v in asdict(self).items() if k != "logits"}


def format_table(runs: Sequence[Run]) -> str:
    """Lay the runs out beside each other, one per column."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("", lambda run: run.method),
        (f"{runs[0].metric} before", lambda run: f"{run.before:.3f}"),
        (f"{runs[0].metric} after", lambda run: f"{run.after:.3f}"),
        ("trained parameters", lambda run: f"{run.adapter_parameters:,}"),
        ("  and in the head", lambda run: f"{run.head_parameters:,}"),
        ("seconds to select", lambda run: f"{run.selection_seconds:.1f}"),
        ("seconds to train", lambda run: f"{run.training_seconds:.1f}"),
        ("peak memory, MiB", lambda run: _mebibytes(run.peak_bytes)),
        ("adapter, bytes", lambda run: f"{run.adapter_bytes:,}"),
    ]
    return "\n".join(
        f"{title:<24}" + "".join(f"{cell(run):>12}" for run in runs)
        for title, cell in rows
    )


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"


def peak_memory() -> int | None:
    """Return the most memory that this process has had, libraries and all, in bytes.

    Windows does not tell; None there.
    """
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
