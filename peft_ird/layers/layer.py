"""The layer that applies sparse deltas to the parameters of a module."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_ird.layers.holding import Codes, Holding, Values, device_of
from peft_ird.layers.merging import Rounding, unmerge
from peft_ird.layers.mixed_batch import BASE, by_sample
from peft_ird.layers.quantized import CodedWeight
from peft_ird.layers.reading import Reading
from peft_ird.layers.substitution import call_with_parameters, lending
from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.ops import add_deltas

__all__ = ["Deltas", "IRDLayer"]

Deltas = Mapping[str, list[SparseDelta]]


class IRDLayer(Reading, Holding):
    """A module whose parameters get sparse deltas; this kind serves any module.

    The deltas are added to the parameters for the call, in a shallow copy of the base
    layer: the base weights are not written to, and hooks on the base layer run. Kinds
    for what is used most have ways of their own.

    Args:
        base_layer: The module, or another tuner's layer around it.
    """

    adapters: Sequence[str] = ()  # of the model, here or elsewhere
    adapter_layer_names = ("irdelta_values",)
    other_param_names = ("irdelta_coded", "irdelta_indices", "irdelta_originals")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.irdelta_values: Any = nn.ModuleDict()  # adapter -> parameter -> values [k]
        self.irdelta_coded = Codes()
        self.irdelta_indices: Any = nn.ModuleDict()  # the same, adapter -> parameter
        self.irdelta_originals: Any = nn.ModuleDict()  # what merging overwrote
        self.merged_adapters = []
        base = self.get_base_layer()
        self._names = tuple(n for n, _ in base.named_parameters(recurse=False))
        self.path = type(base).__name__
        self.cast_input_dtype_enabled = True  # PEFT's helper turns it off for a while
        self.rounding = Rounding()
        self._disable_adapters = False
        self._unchecked = set()
        self._supports = {}
        self._fingerprints = {}
        self._numels = {}
        # Parameters that other layers hold, too; these may have deltas.
        self._shared: dict[str, list[tuple[IRDLayer, str]]] = {}
        self._is_tied = False  # whether another layer uses a parameter of this one
        self.register_load_state_dict_post_hook(_check_what_was_loaded)  # type: ignore[no-untyped-call]
        self.in_features, self.out_features = self._features(base)

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        inputs = [
            getattr(base_layer, f"in_{n}", None) for n in ("features", "channels")
        ]
        outputs = [
            getattr(base_layer, f"out_{n}", None) for n in ("features", "channels")
        ]
        return inputs[0] or inputs[1], outputs[0] or outputs[1]

    def update_layer(
        self,
        adapter_name: str,
        indices: Mapping[str, Tensor] | None,
        counts: Mapping[str, int],
        init_weights: bool = True,
        inference_mode: bool = False,
        numels: Mapping[str, int] | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        """Give an adapter entries in this layer, in place of those that it had.

        Args:
            adapter_name: The adapter.
            indices: Sorted flat positions per parameter. Shape ``[k]`` each; None for
                an adapter that is still to be loaded.
            counts: Number of entries per parameter.
            init_weights: Whether the values start at zero (else random, for tests).
            inference_mode: Whether the values stay frozen.
            numels: Entries of each parameter in the model that the adapter was saved
                from. Default: those here.
            fingerprint: What the base weights at loaded indices should hash to.
        """
        self._refuse_if_merged(adapter_name)
        values = Values()
        # Optimizers know parameters by their order, whoever counted the entries.
        own = self.get_base_layer()._parameters
        order = dict.fromkeys(["weight", *own, *sorted(counts)])
        for name in (name for name in order if name in counts):
            weight = self._base_parameter(name)
            init = torch.zeros if init_weights or indices is None else torch.randn
            drawn = init(counts[name]).to(device_of(weight), weight.dtype)
            values[name] = nn.Parameter(drawn)
        self.irdelta_values[adapter_name] = values
        self._hold(adapter_name, indices, counts, numels)
        self._fingerprints.pop(adapter_name, None)
        if fingerprint and indices is None:
            self._fingerprints[adapter_name] = fingerprint
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def get_base_layer(self) -> Any:
        """Return the module inside all tuners' layers, as PEFT's but faster."""
        base: Any = self._modules["base_layer"]
        while "base_layer" in base._modules:
            base = base._modules["base_layer"]
        return base

    def share(self, name: str, owner: "IRDLayer", owned_name: str) -> None:
        """Use the deltas of another layer, too, for a parameter that both hold.

        Args:
            name: The parameter's name here.
            owner: The layer that has deltas of it.
            owned_name: The parameter's name there.
        """
        owners = self._shared.setdefault(name, [])
        if (owner, owned_name) not in owners:
            owners.append((owner, owned_name))
        self._is_tied = owner._is_tied = True

    def has_entries(self, name: str) -> bool:
        """Return whether any adapter has entries in a parameter of this layer."""
        return any(name in values for values in self.irdelta_values.values())

    def drop_entries(self, adapter_name: str) -> None:
        """Forget an adapter's entries in this layer, if it has some."""
        self._refuse_if_merged(adapter_name)
        for name in ("irdelta_values", "irdelta_coded", "irdelta_indices"):
            container = getattr(self, name)
            if adapter_name in container:
                del container[adapter_name]
        self._forget(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Args:
            adapter_name: The adapter.
        """
        self.adapters = [name for name in self.adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        """Return the model's adapters: one of them is active when one is deleted.

        It must be the same in all layers, also in those where it has no entries.
        """
        return sorted(self.adapters)

    def _refuse_if_merged(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Adapter '{adapter_name}' is merged into the base weights; call "
                "`unmerge_adapter()` before its entries are replaced."
            )

    def _delta(self, adapter_name: str, name: str) -> SparseDelta:
        indices = self._indices(adapter_name)[name]
        values = self.irdelta_values[adapter_name]()
        return self._assembled(adapter_name, name, indices, values[name])

    def _assembled(
        self, adapter_name: str, name: str, indices: Tensor, values: Tensor
    ) -> SparseDelta:
        shape = self._base_parameter(name).shape
        support = self._support(adapter_name, name, indices.device)
        return SparseDelta(indices, values, shape, support)

    def _base_parameter(self, name: str) -> Tensor:
        parameter: Tensor = getattr(self.get_base_layer(), name)
        return parameter

    def _check_writable(self, name: str) -> None:
        weight = self._base_parameter(name)
        if isinstance(weight, CodedWeight):
            raise ValueError(
                f"'{self.path}' is quantised; deltas can only be merged into plain "
                "weights. Keep the adapter beside the model, or merge it into the "
                "unquantised one."
            )
        if isinstance(weight, DTensor):
            raise ValueError(
                f"'{self.path}.{name}' is sharded over devices; deltas can only be "
                "merged into whole weights. Save the adapter, and merge it into an "
                "unsharded model."
            )

    def parameter_in_force(self, name: str) -> Any:
        """Return a base parameter with the active deltas, or without if they are off.

        Args:
            name: The parameter.
        """
        if self.disable_adapters:  # reading writes nothing: `forward` unmerges
            return self.before_merging(name, self._base_parameter(name))
        return super().parameter_in_force(name)

    def _overwritten(self, name: str) -> list[tuple[int, Mapping[str, Tensor]]]:
        found = super()._overwritten(name)
        for owner, owned_name in self._shared.get(name, ()):
            found += Holding._overwritten(owner, owned_name)
        return found

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

    def forward(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Run the base layer with the deltas of the active adapters.

        Args:
            *args: What the base layer takes.
            adapter_names: The adapter of each sample, in place of the active ones.
            **kwargs: What the base layer takes.
        """
        if "_is_replica" in self.__dict__:  # of which some lack parameters
            raise RuntimeError(
                "nn.DataParallel does not work with IRD adapters. Start the script by "
                "torchrun or accelerate launch, or show it one GPU by "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if self.disable_adapters:
            self._unmerge_all()
        if adapter_names is None:
            return self._run_or_pass(self._deltas_in_force(), *args, **kwargs)
        found = {name: self._deltas_in_force([name]) for name in {*adapter_names}}
        names = [name if found[name] else BASE for name in adapter_names]
        found[BASE] = {}

        def run(name: str, *args: Any, **kwargs: Any) -> Any:
            return self._run_or_pass(found[name], *args, **kwargs)

        return by_sample(run, names, adapter_names, args, kwargs)

    def _unmerge_all(self) -> None:
        """Unmerge what this layer computes with, be it another that was written to."""
        others = [owner for owners in self._shared.values() for owner, _ in owners]
        unmerge(layer for layer in {self, *others} if layer.merged)

    def _run_or_pass(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        if deltas:
            return self._run(deltas, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        return self._pass(*args, **kwargs)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer, unless another thread has deltas in it at that time."""
        with lending(self.base_layer):
            return self.base_layer(*args, **kwargs)

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        with lending(self.base_layer):
            weights = {name: self._base_parameter(name) for name in deltas}
            if "forward" in vars(self.get_base_layer()):  # accelerate's
                self._refuse_offloaded(weights)
            parameters = {n: add_deltas(w, deltas[n]) for n, w in weights.items()}
            return call_with_parameters(self.base_layer, parameters, args, kwargs)

    def _refuse_offloaded(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            if weight.is_meta:
                raise ValueError(
                    f"'{self.path}.{name}' is offloaded, and modules of its type do "
                    "not compute with a delta there. Keep the module in memory, by its "
                    "`device_map`, or leave it out by `exclude_modules`."
                )

    def _deltas_in_force(
        self, adapters: Sequence[str] | None = None
    ) -> dict[str, list[SparseDelta]]:
        """Return the deltas of adapters, by default the active ones, by parameter."""
        deltas = self._own_deltas(adapters)
        for name, owners in self._shared.items():
            for owner, owned_name in owners:
                found = owner._own_deltas(adapters).get(owned_name)
                if found:
                    deltas[name] = [*deltas.get(name, ()), *found]
        return deltas

    def _own_deltas(
        self, adapters: Sequence[str] | None
    ) -> dict[str, list[SparseDelta]]:
        if self.disable_adapters or self.merged:
            return {}
        deltas: dict[str, list[SparseDelta]] = {}
        held = self.irdelta_values
        for adapter in self.active_adapters if adapters is None else adapters:
            if adapter not in held:
                continue
            indices = self._indices(adapter)
            for name, values in held[adapter]().items():
                if values.numel():
                    delta = self._assembled(adapter, name, indices[name], values)
                    deltas.setdefault(name, []).append(delta)
        return deltas

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        weights = map(self._base_parameter, self.entry_counts(adapter_name))
        devices = [device_of(weight) for weight in weights]  # not that of the offloaded
        device = device or next(iter(devices), None)
        if device is None:
            return
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, name)
            tensors = (*held.parameters(), *held.buffers())
            if adapter_name in held and not any(tensor.is_meta for tensor in tensors):
                # in its type: that of the base weights would round what was loaded
                held[adapter_name] = held[adapter_name].to(device)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        module = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._unchecked.update(self._supports)  # `to_empty` leaves no indices there
        self._check_early()
        return module

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for adapter, code in self._codes().items():
            destination[f"{prefix}irdelta_coded.{adapter}"] = code

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *lists: list[str],
    ) -> None:
        for adapter in self.irdelta_values:
            key = f"{prefix}irdelta_coded.{adapter}"
            if key in state_dict:
                if self._fits(adapter, state_dict, prefix):
                    self._make_room(adapter, state_dict[key].numel())
                else:  # indices stay as they are; torch complains of the values
                    del state_dict[key]
            elif strict and adapter not in self.irdelta_coded:
                missing.append(key)
        for name, values in self.irdelta_values.named_parameters():
            key = f"{prefix}irdelta_values.{name}"
            if values.is_meta and key in state_dict:  # what takes its place is alike
                state_dict[key] = state_dict[key].to(values.dtype)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, *lists
        )

    def _fits(self, adapter: str, tensors: dict[str, Tensor], prefix: str) -> bool:
        """Return whether values that are to be loaded have names and sizes of these."""
        prefix = f"{prefix}irdelta_values.{adapter}."
        new = {k: t.shape for k, t in tensors.items() if k.startswith(prefix)}
        own = self.irdelta_values[adapter].items()
        return not new or new == {prefix + name: v.shape for name, v in own}

    def _check_early(self) -> None:
        """Check what can be checked, for compilers; errors wait until it is used."""
        for adapter in tuple(self._unchecked):
            with suppress(ValueError):
                self._check(adapter)

    def __repr__(self) -> str:
        return "ird." + super().__repr__()


def _check_what_was_loaded(layer: IRDLayer, _: Any) -> None:
    layer._check_early()
