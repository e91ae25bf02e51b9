"""The result of a selection: which entries, from which samples, by which steps."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_ird.selection.schedule import Cell
from peft_ird.sparse.delta import check_indices
from peft_ird.sparse.storage import load_tensors, save_tensors

__all__ = ["Selection"]

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Selection:
    """Entries chosen for training, and how they were chosen.

    Args:
        indices: Sorted flat row-major positions, ``{module: {parameter: [k]}}``, int32
            (int64 past 2^31), on the CPU; parameters without entries are left out.
        shapes: Shape of each of these parameters.
        scores: What each entry was ranked by, in the layout of ``indices``.
        samples: Positions kept in the calibration data, ascending; empty without data.
        sample_scores: Last score of each kept sample. Shape ``[len(samples)]``,
            float64; empty where samples were not ranked.
        stages: The cells walked, as (num_samples, density).
        seconds: Duration of each stage.
        method: The method's name.
        seed: The seed.
        num_candidates: Number of candidate entries.
    """

    indices: Mapping[str, Mapping[str, Tensor]]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    scores: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    samples: tuple[int, ...] = ()
    sample_scores: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.float64)
    )
    stages: tuple[Cell, ...] = ()
    seconds: tuple[float, ...] = ()
    method: str = "ird"
    seed: int = 0
    num_candidates: int = 0

    def __len__(self) -> int:
        return sum(
            count for counts in self.counts.values() for count in counts.values()
        )

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of entries per module and parameter."""
        return {
            module: {name: t.numel() for name, t in parameters.items()}
            for module, parameters in self.indices.items()
        }

    @property
    def density(self) -> float:
        """Share of the candidates that is selected."""
        return len(self) / self.num_candidates if self.num_candidates else 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selection to one safetensors file, whole or not at all.

        Args:
            path: The file.
        """
        tensors = {
            f"{kind}/{module}/{name}": tensor
            for kind in ("indices", "scores")
            for module, parameters in getattr(self, kind).items()
            for name, tensor in parameters.items()
        }
        facts = {k: v for k, v in asdict(_bare(self)).items() if k not in _TENSORS}
        save_tensors(
            path,
            {**tensors, "sample_scores": self.sample_scores},
            {"format": _FORMAT, "kind": "peft_ird.Selection", **facts},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Selection":
        """Read a selection.

        Args:
            path: A file that `save` wrote.

        Returns:
            The selection.

        Raises:
            ValueError: If the file is damaged or holds something else.
        """
        tensors, facts = load_tensors(path)
        kind, version = facts.pop("kind", None), facts.pop("format", None)
        if kind != "peft_ird.Selection" or version != _FORMAT:
            raise ValueError(
                f"'{path}' holds no selection that this version reads: kind {kind!r}, "
                f"format {version!r}, expected 'peft_ird.Selection', {_FORMAT}."
            )
        selection = cls(
            indices=_tree(tensors, "indices"),
            scores=_tree(tensors, "scores"),
            sample_scores=tensors["sample_scores"],
            samples=tuple(facts.pop("samples")),
            stages=tuple(Cell(*cell) for cell in facts.pop("stages")),
            seconds=tuple(facts.pop("seconds")),
            **facts,
        )
        selection.check()
        return selection

    def check(self) -> None:
        """Check that indices are sorted, distinct and inside their parameters.

        Raises:
            ValueError: If they are not; the parameter is named.
        """
        for module, parameters in self.indices.items():
            for name, indices in parameters.items():
                numel = torch.Size(self.shapes[module][name]).numel()
                check_indices(indices, numel, f"{module}.{name}")


_TENSORS = ("indices", "scores", "sample_scores")


def _bare(selection: Selection) -> Selection:
    kept = {k: v for k, v in vars(selection).items() if k not in _TENSORS}
    return Selection(indices={}, **kept)


def _tree(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    tree: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        head, _, rest = key.partition("/")
        if head == kind:
            module, _, name = rest.rpartition("/")
            tree.setdefault(module, {})[name] = tensor
    return tree
