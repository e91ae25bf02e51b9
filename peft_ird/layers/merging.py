"""Deltas written into the base weights, and taken out again bit for bit."""

import itertools
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    onload_layer,
)
from torch import Tensor, nn

from peft_ird._registration import BufferDict
from peft_ird.sparse.ops import gather, scatter_
from peft_ird.sparse.products import HALVES

__all__ = [
    "Merging",
    "Rounding",
    "check_merge",
    "is_low_precision",
    "report_rounding",
    "unmerge",
]

logger = logging.getLogger(__name__)

_MERGES = itertools.count()  # of this process; tied weights may have several
_TOLERATED = 0.1


@dataclass(frozen=True)
class Rounding:
    r"""What merging into bfloat16 or float16 weights lost of the deltas.

    Args:
        lost: :math:`\sum |W' - W - \Delta|` over the entries that were merged into
            such weights, with the weight :math:`W'` that was written.
        total: :math:`\sum |\Delta|` over the same entries.
    """

    lost: float = 0.0
    total: float = 0.0

    @property
    def share(self) -> float:
        """The part of the deltas that was lost; may exceed 1 if all are tiny."""
        return self.lost / self.total if self.total else 0.0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(self.lost + other.lost, self.total + other.total)


def report_rounding(parts: Iterable[Rounding]) -> None:
    """Log what merging all layers lost, and warn above a tenth.

    Args:
        parts: One for each layer.
    """
    rounding = sum(parts, Rounding())
    if rounding.total == 0:
        return
    logger.info("Rounding lost %.2f %% of the merged deltas.", 100 * rounding.share)
    if rounding.share > _TOLERATED:
        warnings.warn(
            f"Merging into low-precision weights lost {rounding.share:.0%} of the "
            "deltas to rounding. Call `unmerge_adapter()` and keep the adapter beside "
            "the weights, or load the base model in float32, merge, and convert it "
            "afterwards if need be.",
            stacklevel=3,
        )


def is_low_precision(tensor: Tensor) -> bool:
    """Return whether adding small deltas to a tensor would lose many of them."""
    return tensor.dtype in HALVES


class Originals(nn.ModuleDict):
    """What a merge overwrote, by parameter: places, entries, and what it wrote.

    Attributes:
        number: Of the merge; later ones have larger ones.
    """

    number: int

    def __init__(self) -> None:
        super().__init__()
        self.number = next(_MERGES)


class Merging(BaseTunerLayer):  # type: ignore[misc]
    """The part of a layer that merges its deltas."""

    irdelta_values: Any  # adapter -> parameter -> values [k]
    irdelta_originals: Any  # adapter -> parameter -> what merging overwrote, and where
    merged_adapters: list[str]
    rounding: Rounding  # of the last merge
    path: str  # the module's name

    def _indices(self, adapter_name: str) -> dict[str, Tensor]:
        raise NotImplementedError

    def _base_parameter(self, name: str) -> Tensor:
        raise NotImplementedError

    def _check(self, adapter: str) -> None:
        raise NotImplementedError

    def _check_writable(self, name: str) -> None:
        raise NotImplementedError

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Write the deltas into the base weights; the old entries are kept.

        What low-precision weights lose of the deltas is in ``rounding`` afterwards. An
        error or an interruption leaves the weights as they were.

        Args:
            safe_merge: Whether to refuse to write what is not finite.
            adapter_names: The adapters to merge. Default: the active ones.

        Raises:
            ValueError: If an adapter cannot be merged, as `check_merge` says.
        """
        self.rounding = Rounding()
        names = self._to_merge(check_adapters_to_merge(self, adapter_names))
        self.check_merge(names)
        count = len(self.merged_adapters)
        try:
            for adapter in names:
                self._merge_one(adapter, safe_merge)
        except BaseException:
            while len(self.merged_adapters) > count:
                self._unmerge_last()
            for adapter in {*names} & {*self.irdelta_originals}:
                del self.irdelta_originals[adapter]
            raise

    def _merge_one(self, adapter: str, safe_merge: bool) -> None:
        merged = self._merged_entries(adapter)
        if safe_merge:
            self._check_finite(adapter, merged.values())
        self._keep_originals(adapter, merged)
        self.merged_adapters.append(adapter)  # first: what is written can be undone
        for name, written in merged.items():
            self.rounding += self._lost(adapter, name, written)
        for name, indices in self._indices(adapter).items():
            scatter_(self._base_parameter(name).data, indices, merged[name])

    def check_merge(
        self, adapter_names: Sequence[str] | None, safe_merge: bool = False
    ) -> None:
        """Check that adapters can be merged here; nothing is written.

        Args:
            adapter_names: The adapters to merge. Default: the active ones.
            safe_merge: Whether to check that all sums are finite.

        Raises:
            ValueError: If their weights are quantised or sharded, if their entries are
                damaged or for other weights, or if a sum is not finite.
        """
        names = self._to_merge(adapter_names)
        for adapter in names:
            for name in self.irdelta_values[adapter]:
                self._check_writable(name)
            self._check(adapter)
        if safe_merge and names:
            self._check_sums(names)

    def _to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Return the adapters that have entries here and are not merged yet."""
        asked = self.active_adapters if adapter_names is None else adapter_names
        return [
            name
            for name in dict.fromkeys(asked)
            if name in self.irdelta_values and name not in self.merged_adapters
        ]

    def _check_sums(self, adapter_names: Sequence[str]) -> None:
        """Merge adapters one after another into a copy of their entries."""
        indices = {adapter: self._indices(adapter) for adapter in adapter_names}
        for name in dict.fromkeys(name for each in indices.values() for name in each):
            owners = [adapter for adapter in adapter_names if name in indices[adapter]]
            union = torch.cat([indices[adapter][name] for adapter in owners]).unique()
            entries = gather(self._base_parameter(name).data, union)
            for adapter in owners:
                at = torch.searchsorted(union, indices[adapter][name])
                values = self.irdelta_values[adapter][name].detach()
                entries[at] = _plus(entries[at], values)
                self._check_finite(adapter, [entries])

    def _check_finite(self, adapter: str, entries: Iterable[Tensor]) -> None:
        if not all(bool(part.isfinite().all()) for part in entries):
            raise ValueError(
                "NaNs detected in the merged weights. The adapter "
                f"{adapter} seems to be broken, in '{self.path}'."
            )

    def unmerge(self) -> None:
        """Put the entries back that merging overwrote, bit for bit.

        What another tuner has added to them since stays, up to rounding.
        """
        if not self.merged and len(self.irdelta_values):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._unmerge_last()

    def _unmerge_last(self) -> None:
        adapter = self.merged_adapters[-1]
        for name, kept in self.irdelta_originals[adapter].items():
            _undo_(self._base_parameter(name).data, kept)
        self.merged_adapters.pop()  # last: an interrupted unmerge is taken up again
        del self.irdelta_originals[adapter]

    def before_merging(self, name: str, weight: Tensor) -> Tensor:
        """Return a base parameter as it was before anything was merged.

        Args:
            name: The parameter.
            weight: The parameter as it is now, or a copy; it is not changed.
        """
        found = weight
        overwritten = sorted(self._overwritten(name), key=itemgetter(0), reverse=True)
        for _, kept in overwritten:
            found = found.detach().clone() if found is weight else found
            _undo_(found, kept)
        return found

    def _overwritten(self, name: str) -> list[tuple[int, Mapping[str, Tensor]]]:
        """Return the numbers of merges into a parameter, and what they overwrote."""
        merges = [self.irdelta_originals[adapter] for adapter in self.merged_adapters]
        return [(each.number, each[name]) for each in merges if name in each]

    def _original_entries(self, name: str, indices: Tensor) -> Tensor:
        """Return base entries as they were before anything was merged. Shape [k]."""
        entries = gather(self._base_parameter(name).data, indices)
        for adapter in reversed(self.merged_adapters):  # the first has the last say
            if name in self.irdelta_originals[adapter]:
                kept = self.irdelta_originals[adapter][name]
                where = indices.to(kept["indices"].device)
                at = torch.searchsorted(kept["indices"], where.contiguous())
                at = at.clamp_(max=max(0, len(kept["indices"]) - 1))
                if len(kept["indices"]):
                    found = kept["indices"][at] == where
                    entries = torch.where(found, kept["entries"][at], entries)
        return entries

    def _merged_entries(self, adapter: str) -> dict[str, Tensor]:
        merged = {}
        for name, indices in self._indices(adapter).items():
            weight = self._base_parameter(name).data
            values = self.irdelta_values[adapter][name].detach()
            merged[name] = _plus(gather(weight, indices), values)
        return merged

    def _lost(self, adapter: str, name: str, written: Tensor) -> Rounding:
        if not is_low_precision(written) or written.is_meta:
            return Rounding()
        old = self.irdelta_originals[adapter][name]["entries"].double()
        values = self.irdelta_values[adapter][name].detach().double()
        error = written.double() - old - values
        return Rounding(float(error.abs().sum()), float(values.abs().sum()))

    def _keep_originals(self, adapter: str, merged: Mapping[str, Tensor]) -> None:
        kept = Originals()
        for name, indices in self._indices(adapter).items():
            found = {
                "indices": indices.clone(),
                "entries": gather(self._base_parameter(name).data, indices),
                "written": merged[name],
            }
            kept[name] = BufferDict(found, persistent=False)
        self.irdelta_originals[adapter] = kept


def unmerge(layers: Iterable[BaseTunerLayer]) -> None:
    """Unmerge layers, so that every bit comes back where they share a weight.

    Args:
        layers: Layers of any tuner; what ours merged last is undone first.
    """
    merges = []
    for layer in layers:
        if isinstance(layer, Merging) and layer.merged:
            originals = map(layer.irdelta_originals.__getitem__, layer.merged_adapters)
            merges += [(each.number, layer) for each in originals]
        else:
            with onload_layer(layer):
                layer.unmerge()
    for _, layer in sorted(merges, key=itemgetter(0), reverse=True):
        with onload_layer(layer):
            layer._unmerge_last()


def check_merge(
    tuner: BaseTuner, adapter_names: Sequence[str] | None, safe_merge: bool
) -> None:
    """Look at all layers before one of them is written to.

    Args:
        tuner: The tuner; layers of other kinds are left to it.
        adapter_names: The adapters to merge. Default: the active ones.
        safe_merge: Whether to check that all sums are finite.

    Raises:
        ValueError: If an adapter cannot be merged, as `Merging.check_merge` says.
    """
    for layer in tuner.model.modules():
        if isinstance(layer, Merging) and layer._to_merge(adapter_names):
            with onload_layer(layer):
                layer.check_merge(adapter_names, safe_merge)


def _plus(entries: Tensor, values: Tensor) -> Tensor:
    """Return the sum in the type of the entries."""
    common = entries.dtype
    if is_low_precision(entries):
        common = torch.promote_types(common, values.dtype)
    return (entries.to(common) + values.to(common)).to(entries.dtype)


def _undo_(weight: Tensor, kept: Mapping[str, Tensor]) -> None:
    """Put back what merging overwrote."""
    now = gather(weight, kept["indices"])
    entries = _undone(now, kept["entries"], kept["written"])
    scatter_(weight, kept["indices"], entries)


def _undone(now: Tensor, before: Tensor, written: Tensor) -> Tensor:
    """Return entries as they were before, with what others have added since."""
    common = torch.promote_types(now.dtype, torch.float32)
    added = now.to(common) - written.to(common)
    is_same = (now == written) | (now.isnan() & written.isnan())
    left = (before.to(common) + added).to(now.dtype)
    # An interruption may have come before they were written, or after they were undone.
    return torch.where(is_same | (now == before), before, left)
