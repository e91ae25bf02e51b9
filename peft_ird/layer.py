"""The layer that applies sparse deltas to the parameters of a module."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from peft_ird._registration import BufferDict
from peft_ird.sparse.delta import SparseDelta, check_indices, index_dtype
from peft_ird.sparse.ops import add_deltas, gather, scatter_

__all__ = ["Deltas", "IRDLayer", "is_low_precision", "with_parameters"]

_UNLOADED = -1  # an index before the weights are loaded
Deltas = Mapping[str, list[SparseDelta]]


def is_low_precision(tensor: Tensor) -> bool:
    """Return whether adding small deltas to a tensor would lose many of them."""
    return tensor.dtype in {torch.float16, torch.bfloat16}


class IRDLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module whose parameters get sparse deltas; this kind serves any module.

    The deltas are added to the parameters for the call, in a shallow copy of the base
    layer: the base weights are never written to, and hooks on the base layer run.

    Args:
        base_layer: The module, or another tuner's layer around it.
    """

    adapter_layer_names = ("irdelta_values",)
    other_param_names = ("irdelta_indices", "irdelta_originals")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.irdelta_values: Any = nn.ModuleDict()  # adapter -> parameter -> values [k]
        self.irdelta_indices: Any = (
            nn.ModuleDict()
        )  # adapter -> parameter -> indices [k]
        self.irdelta_originals: Any = nn.ModuleDict()  # what merging overwrote
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unchecked: set[str] = set()
        # Parameters that another layer owns too; that layer has the deltas.
        self._shared: dict[str, tuple[IRDLayer, str]] = {}
        self.in_features, self.out_features = self._features(self.get_base_layer())

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        inputs = getattr(base_layer, "in_channels", None)
        outputs = getattr(base_layer, "out_channels", None)
        return inputs, outputs

    # ---- entries ----

    def update_layer(
        self,
        adapter_name: str,
        indices: Mapping[str, Tensor] | None,
        counts: Mapping[str, int],
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Give an adapter entries in this layer, in place of those that it had.

        Args:
            adapter_name: The adapter.
            indices: Sorted flat positions per parameter. Shape ``[k]`` each; None for
                an adapter that is still to be loaded.
            counts: Number of entries per parameter.
            init_weights: Whether the values start at zero (else random, for tests).
            inference_mode: Whether the values stay frozen.
        """
        values, positions = nn.ParameterDict(), BufferDict(persistent=True)
        for name, count in counts.items():
            weight = self._base_parameter(name)
            init = torch.zeros if init_weights or indices is None else torch.randn
            values[name] = nn.Parameter(init(count).to(weight.device, weight.dtype))
            positions[name] = (
                torch.full((count,), _UNLOADED, dtype=index_dtype(weight.numel()))
                if indices is None
                else indices[name].clone()
            ).to(weight.device)
        self.irdelta_values[adapter_name] = values
        self.irdelta_indices[adapter_name] = positions
        self._unchecked.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def share(self, name: str, owner: "IRDLayer", owned_name: str) -> None:
        """Use the deltas of another layer for a parameter that both hold.

        Args:
            name: The parameter's name here.
            owner: The layer that has the deltas.
            owned_name: The parameter's name there.
        """
        self._shared[name] = (owner, owned_name)

    def entry_counts(self, adapter_name: str) -> dict[str, int]:
        """Return an adapter's number of entries per parameter of this layer."""
        if adapter_name not in self.irdelta_indices:
            return {}
        indices = self.irdelta_indices[adapter_name]
        return {name: tensor.numel() for name, tensor in indices.items()}

    def has_entries(self, name: str) -> bool:
        """Return whether any adapter has entries in a parameter of this layer."""
        return any(name in indices for indices in self.irdelta_indices.values())

    def drop_entries(self, adapter_name: str) -> None:
        """Forget an adapter's entries in this layer, if it has some."""
        for container in (self.irdelta_values, self.irdelta_indices):
            if adapter_name in container:
                del container[adapter_name]

    def _delta(self, adapter_name: str, name: str) -> SparseDelta:
        return SparseDelta(
            self.irdelta_indices[adapter_name][name],
            self.irdelta_values[adapter_name][name],
            self._base_parameter(name).shape,
        )

    def _base_parameter(self, name: str) -> Tensor:
        parameter: Tensor = getattr(self.get_base_layer(), name)
        return parameter

    def get_delta_weight(self, adapter_name: str, name: str = "weight") -> Tensor:
        """Return an adapter's delta of one parameter as a dense tensor.

        Args:
            adapter_name: The adapter.
            name: The parameter.

        Returns:
            The delta. Shape and dtype of the parameter; zeros without entries.
        """
        weight = self._base_parameter(name)
        if name not in self.entry_counts(adapter_name):
            return torch.zeros_like(weight)
        return self._delta(adapter_name, name).to_dense(weight.dtype)

    # ---- forward ----

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with the deltas of the active adapters."""
        deltas = self._deltas_in_force()
        if not deltas:
            return self.base_layer(*args, **kwargs)
        return self._run(deltas, *args, **kwargs)

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        parameters = {
            name: add_deltas(self._base_parameter(name), found)
            for name, found in deltas.items()
        }
        base = self.base_layer
        if torch.compiler.is_compiling() and not isinstance(base, BaseTunerLayer):
            # A shallow copy breaks the graph; a compiled call swaps safely.
            return torch.func.functional_call(base, parameters, args, kwargs)
        return with_parameters(base, parameters)(*args, **kwargs)

    def _deltas_in_force(self) -> dict[str, list[SparseDelta]]:
        deltas = self._own_deltas()
        for name, (owner, owned_name) in self._shared.items():
            found = owner._own_deltas().get(owned_name)
            if found:
                deltas[name] = found
        return deltas

    def _own_deltas(self) -> dict[str, list[SparseDelta]]:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return {}
        if self.merged:
            return {}
        deltas: dict[str, list[SparseDelta]] = {}
        for adapter in self.active_adapters:
            if adapter not in self.irdelta_values:
                continue
            if adapter in self._unchecked:
                self._check(adapter)
            for name in self.irdelta_values[adapter]:
                deltas.setdefault(name, []).append(self._delta(adapter, name))
        return deltas

    def _check(self, adapter: str) -> None:
        """Check indices that came from outside, once, before they are used."""
        for name, indices in self.irdelta_indices[adapter].items():
            if indices.numel() and int(indices[0]) == _UNLOADED:
                raise ValueError(
                    f"Adapter '{adapter}' was set up from a saved configuration, but "
                    "its weights were never loaded. Load them with `load_adapter` or "
                    "`PeftModel.from_pretrained`; to select anew, set the "
                    "configuration's `nnz_pattern` to None."
                )
            check_indices(indices, self._base_parameter(name).numel(), name)
        self._unchecked.discard(adapter)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unchecked.update(self.irdelta_values)
        super()._load_from_state_dict(*args, **kwargs)

    # ---- what others read ----

    def parameter_in_force(self, name: str) -> Tensor:
        """Return a base parameter with the deltas of the active adapters.

        Some modules read a child's weight and never call it, as multi-head attention
        does with its output projection.
        """
        weight = self._base_parameter(name)
        deltas = self._deltas_in_force().get(name)
        return add_deltas(weight, deltas) if deltas else weight

    @property
    def weight(self) -> Any:
        """The base layer's weight with the active deltas."""
        return self._read("weight")

    @property
    def bias(self) -> Any:
        """The base layer's bias with the active deltas."""
        return self._read("bias")

    def _read(self, name: str) -> Any:
        base = self.get_base_layer()
        own = base._parameters.get(name)
        return self.parameter_in_force(name) if own is not None else getattr(base, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return self._read(name)

    # ---- merging ----

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
        for adapter in adapter_names:
            if adapter not in self.irdelta_values:
                continue
            self._check(adapter)
            names = list(self.irdelta_values[adapter])
            merged = {name: self._merged_entries(adapter, name) for name in names}
            if safe_merge and not all(
                bool(t.isfinite().all()) for t in merged.values()
            ):
                raise ValueError(
                    "NaNs detected in the merged weights. The adapter "
                    f"{adapter} seems to be broken"
                )
            self._keep_originals(adapter)
            for name, entries in merged.items():
                indices = self.irdelta_indices[adapter][name]
                scatter_(self._base_parameter(name).data, indices, entries)
            self.merged_adapters.append(adapter)

    def _merged_entries(self, adapter: str, name: str) -> Tensor:
        weight, delta = self._base_parameter(name).data, self._delta(adapter, name)
        values = delta.values.detach()
        common = torch.promote_types(weight.dtype, values.dtype)
        if not is_low_precision(weight):
            common = weight.dtype
        old = gather(weight, delta.indices).to(common)
        return (old + values.to(common)).to(weight.dtype)

    def _keep_originals(self, adapter: str) -> None:
        originals = BufferDict(persistent=False)
        for name, indices in self.irdelta_indices[adapter].items():
            originals[name] = gather(self._base_parameter(name).data, indices)
        self.irdelta_originals[adapter] = originals

    def unmerge(self) -> None:
        """Put the entries back that merging overwrote, bit for bit."""
        if not self.merged and len(self.irdelta_values):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            originals = self.irdelta_originals[adapter]
            for name, entries in originals.items():
                indices = self.irdelta_indices[adapter][name]
                scatter_(self._base_parameter(name).data, indices, entries)
            del self.irdelta_originals[adapter]

    def __repr__(self) -> str:
        return "ird." + super().__repr__()


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow copy of a module that computes with other parameters.

    Everything else is shared with the module, which is not touched.
    """
    clone = copy.copy(module)
    if isinstance(module, BaseTunerLayer):
        inner = with_parameters(module.base_layer, parameters)
        clone._modules = {**module._modules, "base_layer": inner}
    else:
        for name in parameters:  # FSDP keeps views of its flat parameter there
            clone.__dict__.pop(name, None)
        clone._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item]
    return clone
