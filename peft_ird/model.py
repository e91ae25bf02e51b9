"""The tuner: puts a selection into a model, and a saved adapter back."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    check_target_module_exists,
)
from torch import Tensor, nn

from peft_ird._registration import PREFIX, Merges
from peft_ird.adapter.combining import Combination, add_combined
from peft_ird.adapter.injection import (
    adapter_counts,
    announce,
    as_named_here,
    check_adapter_name,
    check_name,
    install,
    install_nested,
    parameter_shapes,
    resize,
    share_tied,
    without_targets,
)
from peft_ird.adapter.modules import base_model, layers_of, replace
from peft_ird.adapter.record import check_base, fingerprints, holds, missing_codes
from peft_ird.adapter.settling import (
    check_sizes,
    check_tied_heads,
    fitted,
    same_names,
    settle,
)
from peft_ird.config import IRDConfig
from peft_ird.layers.layer import IRDLayer
from peft_ird.layers.merging import Rounding, check_merge, report_rounding, unmerge
from peft_ird.layers.mixed_batch import handed_out
from peft_ird.sparse.storage import (
    FORMAT,
    VALUES,
    entry_counts,
    name_alone,
    plain_name,
    read_entries,
    replaced_modules,
    unwrapped_name,
    with_coded_indices,
)

__all__ = ["IRDModel"]


class IRDModel(Merges):
    """Trains chosen entries of a model's own weights as sparse deltas.

    The entries come from the configuration's ``selection``, from a new selection on
    its ``calibration`` data, or, for a saved adapter, from its weight file. A module
    without a chosen entry stays as it is.

    Args:
        model: The base model; changed in place.
        peft_config: An `IRDConfig`, or a dictionary of them by adapter name.
        adapter_name: The adapter to inject.
        low_cpu_mem_usage: Whether values stay on the meta device until they are loaded.
        state_dict: Saved tensors that tell which entries to make room for.

    Raises:
        ValueError: If the data, the options or a saved adapter do not fit the model;
            the model has not been changed by then.
    """

    prefix: str = PREFIX
    tuner_layer_cls = IRDLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's declaration)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, PeftModel):
            raise ValueError(
                f"The model is a {type(model).__name__} already, and what is trained "
                "inside it could not be saved. Call its `add_adapter` instead; to "
                "combine kinds of adapters, pass `mixed=True` to `get_peft_model`."
            )
        super().__init__(model, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Select entries, or make room for saved ones, and wrap their modules.

        Args:
            model: The base model; changed in place.
            adapter_name: The adapter; its configuration is in ``peft_config``.
            autocast_adapter_dtype: Whether low-precision values are raised to float32.
            low_cpu_mem_usage: Whether values stay on the meta device.
            state_dict: Saved tensors that tell which entries to make room for.

        Raises:
            ValueError: As the class says.
        """
        model = base_model(model)
        config: IRDConfig = self.peft_config[adapter_name]
        given = config.selection
        check_adapter_name(adapter_name)
        try:
            settle(model, config, state_dict)
            check_name(model, config, adapter_name)
            with without_targets(model, config):
                BaseTuner.inject_adapter(
                    self, model, adapter_name, autocast_adapter_dtype,
                    low_cpu_mem_usage, state_dict,
                )  # fmt: skip
            install_nested(model, config, adapter_name, self.active_adapters)
            share_tied(model)
            announce(model, adapter_name)
        except BaseException as error:
            config.selection = given
            if not isinstance(error, Exception):  # PEFT does it after these
                self.peft_config.pop(adapter_name, None)
            raise
        config.selection = None

    @staticmethod
    def _check_target_module_exists(config: IRDConfig, key: str) -> Any:
        key = unwrapped_name(key)
        if key in (config.nnz_pattern or ()):
            return True
        if config.target_modules is None:
            config = copy.copy(config)
            config.target_modules = set()
        found = check_target_module_exists(config, key)
        # What is falsy tells PEFT whether the module was excluded.
        return False if found and config.nnz_pattern is not None else found

    def _prepare_adapter_config(self, peft_config: IRDConfig, _: Any) -> IRDConfig:
        """Return the configuration: no targets means every parameter."""
        return peft_config

    def _create_and_replace(
        self,
        config: IRDConfig,
        adapter_name: str,
        target: nn.Module,
        *_: Any,
        current_key: str,
    ) -> None:
        name = unwrapped_name(current_key)
        if name in (config.nnz_pattern or ()):
            install(base_model(self), config, adapter_name, target, name)

    def _replace_module(
        self, _parent: nn.Module, _name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        replace(self.model, child, new_module)

    unmerge_layers = staticmethod(unmerge)

    @staticmethod
    @contextmanager
    def watched(
        tuner: BaseTuner, adapter_names: list[str] | None, safe_merge: bool
    ) -> Iterator[None]:
        """Look before a merge whether it may be, and say afterwards what it lost.

        Args:
            tuner: This tuner, or a mixed model.
            adapter_names: The adapters to merge. Default: the active ones.
            safe_merge: Whether to check as well that all sums are finite.

        Raises:
            ValueError: If an adapter cannot be merged, as `Merging.check_merge` says.
        """
        check_merge(tuner, adapter_names, safe_merge)
        layers = [m for m in tuner.model.modules() if isinstance(m, IRDLayer)]
        for layer in layers:
            layer.rounding = Rounding()
        yield
        report_rounding(layer.rounding for layer in layers)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter made of others; it is frozen, and not active yet.

        It has every entry that one of them has. A module that is trained whole, as a
        head, is taken over if one adapter alone has it.

        Args:
            adapters: Names of the adapters.
            weights: One for each; may be negative.
            adapter_name: The new adapter.
            combination_type: The rule, see `Combination`; ``"linear"`` is exact.
            density: Share of each parameter's entries that the other rules keep.
            majority_sign_method: ``"total"`` or ``"frequency"``, for those with ties.

        Raises:
            ValueError: If an argument does not fit; nothing has been changed by then.
        """
        rule = Combination(
            adapters, weights, combination_type, density, majority_sign_method
        )
        add_combined(self, adapter_name, rule)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Let ``adapter_names`` of a call reach the layers."""
        with handed_out(self, kwargs.get("adapter_names"), kwargs.get("num_beams")):
            yield

    def _check_tied_modules(self, model: nn.Module, peft_config: IRDConfig) -> None:
        """Warn of tied modules that are trained whole.

        A delta acts in every module that holds its parameter.
        """
        whole = copy.copy(peft_config)
        whole.target_modules = None
        super()._check_tied_modules(model, whole)

    def _check_merge_allowed(self) -> None:
        """Allow tied weights, which PEFT warns of: all modules get what is written."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: IRDConfig,
        adapter_name: str,
        *args: Any,
        **kw: Any,
    ) -> dict[str, Tensor]:
        everything = kw.get("state_dict", {})
        _unmerge_embeddings(model, everything)
        dtype = config.save_dtype and getattr(torch, config.save_dtype)
        if dtype is not None:  # here, too: PEFT takes embeddings from it once more
            for key in everything:
                if VALUES in key:
                    everything[key] = everything[key].to(dtype)
        state_dict: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, *args, **kw
        )
        state_dict.update(missing_codes(model, adapter_name, state_dict))
        named = {cls._remove_adapter_name_from_key(k, adapter_name): v
                 for k, v in state_dict.items()}  # fmt: skip
        config.nnz_pattern = entry_counts(named)
        shapes = _own_shapes(model, config, adapter_name)
        if shapes is None or not same_names(config.nnz_pattern, shapes):
            shapes = parameter_shapes(model, config.nnz_pattern)
        config.shape_pattern, config.format_version = shapes, FORMAT
        config.fingerprint = fingerprints(model, adapter_name, shapes)
        modules = config.nnz_pattern
        return {name_alone(key, modules): v for key, v in state_dict.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: IRDConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        base = base_model(model)
        counts = adapter_counts(base, adapter_name)
        saved = entry_counts(state_dict)
        layers = [m for m in base.modules() if isinstance(m, IRDLayer)]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(
                f"Adapter '{adapter_name}' is merged into the base weights; call "
                "`unmerge_adapter()` before loading other weights into it."
            )
        is_new = any(layer.is_unloaded(adapter_name) for layer in layers)
        expected = counts if is_new or not saved else saved
        if saved:
            shapes = parameter_shapes(model, expected)
            state_dict = with_coded_indices(state_dict, shapes)
            entries = read_entries(state_dict, expected, shapes)
            # Those of a new adapter's file have been compared with the model's.
            known = _own_shapes(model, config, adapter_name) if is_new else None
            check_sizes(base, entries, known or shapes)
            config.forget_fingerprints(replaced_modules(state_dict))
            if is_new and not config.ignore_base_mismatch:
                check_base(base, entries, config.fingerprint or {})
            if not is_new and not holds(model, adapter_name, entries):
                config.provenance = None  # it is of the entries that were here
        if expected != counts:
            check_tied_heads(base, config, expected)
            resize(model, config, adapter_name, expected)
        if saved:
            known = _own_shapes(model, config, adapter_name)  # resizing writes others
            state_dict = fitted(state_dict, entries, known or shapes)
            for layer in layers_of(model).values():
                layer.await_load(adapter_name)
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, as_named_here(model, state_dict)
        )
        return mapped


def _own_shapes(model: nn.Module, config: IRDConfig, adapter_name: str) -> Any:
    """Return the shapes in a configuration, unless it has served another model since.

    Under FSDP only a state dict has whole tensors, so they are not read anew.
    """
    known = config.shape_pattern or {}
    layers = layers_of(model)
    sizes = {name: layer.numels(adapter_name) for name, layer in layers.items()}
    is_other = any(
        sizes.get(module)  # none before indices are loaded
        and sizes[module] != {name: math.prod(shape) for name, shape in named.items()}
        for module, named in known.items()
    )
    return None if is_other else known or None


def _unmerge_embeddings(model: Any, tensors: dict[str, Tensor]) -> None:
    """Put embeddings as they were before merging among tensors: PEFT may save them."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    with suppress(AttributeError, NotImplementedError):
        embeddings.append(model.get_output_embeddings().get_base_layer())
    keys = {plain_name(key): key for key in tensors}
    for name, layer in layers_of(model).items():
        key = keys.get(f"{name}.weight")
        if key is not None and any(layer.get_base_layer() is m for m in embeddings):
            tensors[key] = layer.before_merging("weight", tensors[key])
