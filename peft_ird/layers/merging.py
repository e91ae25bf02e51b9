"""Deltas written into the base weights, and taken out again bit for bit."""

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from peft_ird._registration import BufferDict
from peft_ird.sparse.ops import gather, scatter_

__all__ = ["Merging", "Rounding", "is_low_precision", "report_rounding"]

logger = logging.getLogger(__name__)
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
    return tensor.dtype in {torch.float16, torch.bfloat16}


class Merging(BaseTunerLayer):  # type: ignore[misc]
    """The part of a layer that merges its deltas."""

    irdelta_values: Any  # adapter -> parameter -> values [k]
    irdelta_originals: Any  # adapter -> parameter -> what merging overwrote, and where
    merged_adapters: list[str]
    rounding: Rounding  # of the last merge

    def _indices(self, adapter_name: str) -> dict[str, Tensor]:
        raise NotImplementedError

    def _base_parameter(self, name: str) -> Tensor:
        raise NotImplementedError

    def _check(self, adapter: str) -> None:
        raise NotImplementedError

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Write the deltas into the base weights; the old entries are kept.

        What low-precision weights lose of the deltas is in ``rounding`` afterwards.

        Args:
            safe_merge: Whether to check the result for NaN before anything is written.
            adapter_names: The adapters to merge. Default: the active ones.

        Raises:
            ValueError: If ``safe_merge`` finds a value that is not finite.
        """
        self.rounding = Rounding()
        adapter_names = [*dict.fromkeys(check_adapters_to_merge(self, adapter_names))]
        if safe_merge:
            self.check_finite(adapter_names)
        for adapter in adapter_names:
            if adapter not in self.irdelta_values:
                continue
            self._check(adapter)
            merged = self._merged_entries(adapter)
            self._keep_originals(adapter, merged)
            for name, written in merged.items():
                self.rounding += self._lost(adapter, name, written)
            for name, indices in self._indices(adapter).items():
                scatter_(self._base_parameter(name).data, indices, merged[name])
            self.merged_adapters.append(adapter)

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Check that merging adapters would write finite numbers only.

        Args:
            adapter_names: The adapters.

        Raises:
            ValueError: If it would not.
        """
        for adapter in adapter_names:
            entries = self._merged_entries(adapter).values()
            if not all(bool(part.isfinite().all()) for part in entries):
                raise ValueError(
                    "NaNs detected in the merged weights. The adapter "
                    f"{adapter} seems to be broken"
                )

    def unmerge(self) -> None:
        """Put the entries back that merging overwrote, bit for bit.

        What another tuner has added to them since stays, up to rounding.
        """
        if not self.merged and len(self.irdelta_values):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            for name, kept in self.irdelta_originals[adapter].items():
                _undo_(self._base_parameter(name).data, kept)
            del self.irdelta_originals[adapter]

    def before_merging(self, name: str, weight: Tensor) -> Tensor:
        """Return a base parameter as it was before anything was merged.

        Args:
            name: The parameter.
            weight: The parameter as it is now, or a copy; it is not changed.
        """
        found = weight
        for adapter in reversed(self.merged_adapters):
            if name in self.irdelta_originals[adapter]:
                found = found.detach().clone() if found is weight else found
                _undo_(found, self.irdelta_originals[adapter][name])
        return found

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
            common = weight.dtype
            if is_low_precision(weight):
                common = torch.promote_types(common, values.dtype)
            old = gather(weight, indices).to(common)
            merged[name] = (old + values.to(common)).to(weight.dtype)
        return merged

    def _lost(self, adapter: str, name: str, written: Tensor) -> Rounding:
        if not is_low_precision(written) or written.is_meta:
            return Rounding()
        old = self.irdelta_originals[adapter][name]["entries"].double()
        values = self.irdelta_values[adapter][name].detach().double()
        error = written.double() - old - values
        return Rounding(float(error.abs().sum()), float(values.abs().sum()))

    def _keep_originals(self, adapter: str, merged: Mapping[str, Tensor]) -> None:
        kept = nn.ModuleDict()
        for name, indices in self._indices(adapter).items():
            found = {
                "indices": indices.clone(),
                "entries": gather(self._base_parameter(name).data, indices),
                "written": merged[name],
            }
            kept[name] = BufferDict(found, persistent=False)
        self.irdelta_originals[adapter] = kept


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
    return torch.where(is_same, before, (before.to(common) + added).to(now.dtype))
