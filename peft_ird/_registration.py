"""Tell PEFT about the tuner: the only file that touches its registries and privates."""

from contextlib import nullcontext
from functools import wraps
from typing import Any, Union

import peft.mixed_model
import peft.peft_model
import peft.tuners.mixed
import peft.tuners.mixed.model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers as include_all_linear_layers,
)
from peft.utils import PeftType
from torch import Tensor

from peft_ird.sparse.storage import replacing

__all__ = [
    "IRD",
    "PREFIX",
    "BufferDict",
    "Merges",
    "include_all_linear_layers",
    "register",
]

PREFIX = "irdelta_"  # "ird_" would be found inside "third_" and "bird_"


def _add_peft_type(name: str) -> PeftType:
    """Add a real member to the enum; transformers compares and looks up members."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # The enum's own __setattr__ refuses members; lookup by attribute needs the name.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13
        PeftType._hashable_values_.append(name)
    return member


IRD = _add_peft_type("IRD")


class Merges(BaseTuner):  # type: ignore[misc]
    """A tuner, this one or a mixed model, that watches over the merging of IRD layers.

    It takes off layers within layers, too; PEFT does not look inside them.
    """

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Write the deltas into the base weights.

        What low-precision weights lose of them is logged, and warned of above a tenth.

        Args:
            adapter_names: The adapters to merge. Default: the active ones.
            safe_merge: Whether to check as well that all sums are finite.

        Raises:
            ValueError: If an IRD adapter does not fit its weights, these are quantised
                or sharded, or a sum is not finite; nothing has been written by then.
        """
        with PEFT_TYPE_TO_TUNER_MAPPING[IRD].watched(self, adapter_names, safe_merge):
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take merged deltas out, those that were merged last first."""
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        PEFT_TYPE_TO_TUNER_MAPPING[IRD].unmerge_layers(layers[::-1])

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[IRD]
        layers = tuner.tuner_layer_cls
        options = (merge, progressbar, safe_merge, adapter_names)
        watched = tuner.watched(self, adapter_names, safe_merge)
        with watched if merge else nullcontext():
            while any(isinstance(m, layers) for m in self.model.modules()):
                super()._unload_and_optionally_merge(*options)
            return super()._unload_and_optionally_merge(*options)


class _MixedModel(Merges, MixedModel):  # type: ignore[misc]
    """PEFT's mixed model, handing IRD adapters to the IRD tuner."""

    def _tuner(self, config: Any) -> Any:
        return PEFT_TYPE_TO_MIXED_MODEL_MAPPING[config.peft_type]

    def inject_adapter(
        self, model: Any, adapter_name: str, *args: Any, **kw: Any
    ) -> Any:
        config = self.peft_config[adapter_name]
        if config.peft_type != IRD:
            return super().inject_adapter(model, adapter_name, *args, **kw)
        inject = self._tuner(config).inject_adapter
        return inject(self, model, adapter_name, *args, **kw)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.peft_type == IRD:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.peft_type != IRD:
            super()._create_and_replace(config, *args, **kwargs)
        else:
            self._tuner(config)._create_and_replace(self, config, *args, **kwargs)

    def _check_target_module_exists(self, config: Any, key: str) -> Any:
        if config.peft_type != IRD:
            return super()._check_target_module_exists(config, key)
        return self._tuner(config)._check_target_module_exists(config, key)

    def _replace_module(self, parent: Any, name: str, new: Any, child: Any) -> None:
        tuner = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[IRD]
        if isinstance(child, tuner.tuner_layer_cls):
            tuner._replace_module(self, parent, name, new, child)
        else:
            super()._replace_module(parent, name, new, child)


_write = peft.peft_model.safe_save_file
_save_file_of_peft = getattr(_write, "__wrapped__", _write)  # of a module reloaded


@wraps(_save_file_of_peft)
def _save_file(tensors: dict[str, Tensor], filename: str, **kw: Any) -> None:
    """Write weights as PEFT does; those with deltas appear once they are complete."""
    has_deltas = any(PREFIX in name for name in tensors)
    with replacing(filename) if has_deltas else nullcontext(filename) as place:
        _save_file_of_peft(tensors, place, **kw)


def register(config_cls: type, model_cls: type, layer_cls: type) -> None:
    """Register the tuner; calling it again registers nothing twice.

    Mixed models have no registry: their lists get the tuner, and the class that PEFT
    builds them from becomes a subclass that hands IRD adapters on. The function that
    writes PEFT's files is wrapped, for IRD adapters only.

    Args:
        config_cls: The config class, ``IRDConfig``.
        model_cls: The tuner class, ``IRDModel``.
        layer_cls: The base class of the tuner's layers, ``IRDLayer``.
    """
    first = IRD not in PEFT_TYPE_TO_CONFIG_MAPPING
    PEFT_TYPE_TO_CONFIG_MAPPING[IRD] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[IRD] = model_cls
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[IRD] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[IRD] = PREFIX
    mixed = peft.tuners.mixed.model
    mixed.Configs = Union[mixed.Configs, config_cls]  # noqa: UP007 (built at run time)
    if layer_cls not in mixed.Layers:
        mixed.Layers = (*mixed.Layers, layer_cls)
    if first:
        mixed.PREFIXES.append(PREFIX)
        mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, IRD)
        peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES
        peft.mixed_model.MixedModel = _MixedModel
        peft.peft_model.safe_save_file = _save_file
