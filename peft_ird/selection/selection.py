"""The result of a selection: which entries, from which samples, by which steps."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from peft_ird.selection.places import Place, find_places, layer_order, split_names
from peft_ird.selection.schedule import Cell
from peft_ird.selection.table import aligned
from peft_ird.sparse.delta import check_indices
from peft_ird.sparse.storage import load_tensors, save_tensors

__all__ = ["Selection"]

_FORMAT = 1
_MAX_KINDS = 12


@dataclass(frozen=True, eq=False)
class Selection:
    """Entries chosen for training, and how they were chosen.

    Args:
        indices: Sorted flat row-major positions, ``{module: {parameter: [k]}}``, int32
            (int64 past 2^31), on the CPU; parameters without entries are left out.
        shapes: Shape of each of these parameters.
        scores: What each entry was ranked by, in the layout of ``indices``; with a
            temperature the keys of the draw.
        samples: Positions kept in the calibration data, ascending; empty without data.
        sample_scores: Last score of each kept sample. Shape ``[len(samples)]``,
            float64; empty where samples were not ranked.
        stages: The cells walked, as (num_samples, density).
        seconds: Duration of each stage.
        method: The method's name.
        seed: The seed.
        num_candidates: Number of candidate entries.
        peak_bytes: Peak memory by the end of each stage, of the process on the CPU, of
            the device on CUDA.
        overlaps: For each stage after the first, the share of its entries that the
            stage before had too.
        first_samples: Positions of the samples that the first stage started from.
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
    peak_bytes: tuple[int, ...] = ()
    overlaps: tuple[float, ...] = ()
    first_samples: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(
            count for counts in self.counts.values() for count in counts.values()
        )

    def __repr__(self) -> str:
        return f"<Selection {_headline(self)}>"

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

    def overlap(self, other: "Selection") -> float:
        """Return the share of the smaller selection's entries that both have.

        Args:
            other: A selection in a model of the same shapes.

        Returns:
            1.0 if one is part of the other. An empty selection has 1.0 with another
            empty one and 0.0 with any other.

        Raises:
            ValueError: If a parameter has another shape in the other selection.
        """
        common = 0
        for module, name in _parameters(self) & _parameters(other):
            mine, theirs = (tuple(each.shapes[module][name]) for each in (self, other))
            if mine != theirs:
                raise ValueError(
                    f"`other` is a selection in another model: '{module}.{name}' has "
                    f"shape {theirs} there and {mine} here."
                )
            ours, others = (each.indices[module][name] for each in (self, other))
            common += int(torch.isin(ours, others, assume_unique=True).sum())
        smaller, larger = sorted((len(self), len(other)))
        return common / smaller if smaller else float(larger == 0)

    def places(self, by: str = "module") -> dict[str, Place]:
        """Return where the entries lie: how many, how densely, in how many rows.

        Args:
            by: What to sum over: ``"parameter"``, ``"module"`` (all its parameters),
                ``"kind"`` (modules of the same name in all layers) or ``"layer"``.

        Returns:
            What is known of each part that has entries, by its name, in the order of
            the model; layers by number and then ``"outside"``.

        Raises:
            ValueError: If ``by`` is something else.
        """
        split = split_names(self.indices)
        keys: dict[str, Callable[[str, str], str]] = {
            "parameter": lambda module, name: f"{module}.{name}",
            "module": lambda module, _: module,
            "kind": lambda module, _: split[module][0],
            "layer": lambda module, _: split[module][1],
        }
        if by not in keys:
            allowed = ", ".join(map(repr, keys))
            raise ValueError(f"`by` must be one of {allowed}, got {by!r}.")
        places = find_places(self.indices, self.shapes, keys[by])
        if by == "layer":
            return {layer: places[layer] for layer in sorted(places, key=layer_order)}
        return places

    def summary(self) -> str:
        """Say in a few tables what each stage did and where the entries lie.

        Returns:
            Text of several lines. Kinds of modules are sorted by their entries.
        """
        parts = [_headline(self)]
        if self.stages:
            parts.append(_stage_table(self))
        if len(self):
            kinds = sorted(self.places("kind").items(), key=lambda p: -p[1].entries)
            parts.append(_place_table("kind of module", kinds[:_MAX_KINDS]))
            if rest := [place for _, place in kinds[_MAX_KINDS:]]:
                share = _percent(sum(place.share for place in rest))
                parts[-1] += f"\nand {share} of the entries in {len(rest)} more"
            parts.append(_place_table("layer", [*self.places("layer").items()]))
        return "\n\n".join(parts)

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
        facts = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        shapes = facts.pop("shapes")
        selection = cls(
            shapes={m: {n: tuple(s) for n, s in t.items()} for m, t in shapes.items()},
            indices=_tree(tensors, "indices"),
            scores=_tree(tensors, "scores"),
            sample_scores=tensors["sample_scores"],
            stages=tuple(Cell(*cell) for cell in facts.pop("stages")),
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


def _parameters(selection: Selection) -> set[tuple[str, str]]:
    return {(m, n) for m, parameters in selection.indices.items() for n in parameters}


def _headline(selection: Selection) -> str:
    size, candidates = len(selection), selection.num_candidates
    among = f" of {candidates:,}" if candidates else ""
    share = f" ({_percent(selection.density)})" if candidates else ""
    modules = sum(any(c.values()) for c in selection.counts.values())
    return f"{selection.method}: {size:,}{among} entries{share} in {modules} modules"


def _stage_table(selection: Selection) -> str:
    overlaps = (None, *selection.overlaps) if selection.overlaps else ()
    columns = (selection.stages, selection.seconds, selection.peak_bytes, overlaps)
    rows = [
        [
            str(i),
            f"{cell.num_samples:,}",
            _percent(cell.density),
            "-" if seconds is None else f"{seconds:,.2f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
            _percent(overlap),
        ]
        for i, (cell, seconds, peak, overlap) in enumerate(zip_longest(*columns), 1)
    ]
    head = ["stage", "samples", "density", "seconds", "peak MiB", "overlap"]
    return aligned([head, *rows])


def _place_table(title: str, places: Sequence[tuple[str, Place]]) -> str:
    rows = [
        [name, f"{p.entries:,}"]
        + [_percent(share) for share in (p.share, p.density, p.rows, p.columns)]
        for name, p in places
    ]
    return aligned([[title, "entries", "share", "density", "rows", "columns"], *rows])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"
