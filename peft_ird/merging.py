"""Deltas written into the base weights, and taken out again bit for bit."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from peft_ird._registration import BufferDict
from peft_ird.sparse.ops import gather, scatter_

__all__ = ["Merging", "is_low_precision"]


def is_low_precision(tensor: Tensor) -> bool:
    """Return whether adding small deltas to a tensor would lose many of them."""
    return tensor.dtype in {torch.float16, torch.bfloat16}


class Merging(BaseTunerLayer):  # type: ignore[misc]
    """The part of a layer that merges its deltas."""

    irdelta_values: Any  # adapter -> parameter -> values [k]
    irdelta_originals: Any  # adapter -> parameter -> what merging overwrote, and where
    merged_adapters: list[str]

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

        Args:
            safe_merge: Whether to check the result for NaN before anything is written.
            adapter_names: The adapters to merge. Default: the active ones.

        Raises:
            ValueError: If ``safe_merge`` finds a value that is not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if safe_merge:
            self.check_finite(adapter_names)
        for adapter in adapter_names:
            if adapter not in self.irdelta_values:
                continue
            self._check(adapter)
            merged = self._merged_entries(adapter)
            self._keep_originals(adapter)
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
        """Put the entries back that merging overwrote, bit for bit."""
        if not self.merged and len(self.irdelta_values):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            for name, kept in self.irdelta_originals[adapter].items():
                weight = self._base_parameter(name).data
                scatter_(weight, kept["indices"], kept["entries"])
            del self.irdelta_originals[adapter]

    def _original_entries(self, name: str, indices: Tensor) -> Tensor:
        """Return base entries as they were before anything was merged. Shape [k]."""
        entries = gather(self._base_parameter(name).data, indices)
        for adapter in reversed(
            self.merged_adapters
        ):  # what came first has the last say
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

    def _keep_originals(self, adapter: str) -> None:
        kept = nn.ModuleDict()
        for name, indices in self._indices(adapter).items():
            entries = gather(self._base_parameter(name).data, indices)
            kept[name] = BufferDict(
                {"indices": indices.clone(), "entries": entries}, persistent=False
            )
        self.irdelta_originals[adapter] = kept
