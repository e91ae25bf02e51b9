"""Entries of an adapter in a model: counted, put in, shared and made room for."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Size, Tensor, nn

from peft_ird._registration import PREFIX
from peft_ird.adapter.modules import base_model, base_modules, layers_of, replace
from peft_ird.config import IRDConfig
from peft_ird.layers.kinds import wrap
from peft_ird.layers.layer import IRDLayer
from peft_ird.layers.merging import is_low_precision
from peft_ird.layers.quantized import parameter_of
from peft_ird.sparse.storage import plain_name, unwrapped_name

__all__ = [
    "FILE",
    "Source",
    "adapter_counts",
    "announce",
    "as_named_here",
    "check_adapter_name",
    "check_name",
    "install",
    "install_nested",
    "parameter_shapes",
    "resize",
    "share_tied",
    "without_targets",
]

logger = logging.getLogger(__name__)

Counts = dict[str, dict[str, int]]
Shapes = dict[str, dict[str, list[int]]]


@dataclass(frozen=True)
class Source:
    """What entries come from, and what to do if it does not fit the model."""

    name: str
    advice: str


FILE = Source(
    "The adapter",
    "Load the base model that adapter_config.json names; modules of other names are "
    "not found by a `key_mapping`.",
)


def parameter_shapes(
    model: nn.Module, counts: Mapping[str, Mapping[str, int]], source: Source = FILE
) -> Shapes:
    """Return the shapes of the parameters that are named; all must be there."""
    modules = dict(base_modules(base_model(model)))
    shapes: Shapes = {}
    for module, names in counts.items():
        for name in names:
            parameter = parameter_of(modules.get(module), name)
            if not isinstance(parameter, Tensor):
                raise ValueError(
                    f"The base model has no parameter '{module}.{name}'. "
                    f"{source.name} has entries for it. {source.advice}"
                )
            shapes.setdefault(module, {})[name] = list(parameter.shape)
    return shapes


def adapter_counts(model: nn.Module, adapter_name: str) -> Counts:
    """Return an adapter's entries per module and parameter, as they are in a model."""
    layers = layers_of(model).items()
    found = {name: layer.entry_counts(adapter_name) for name, layer in layers}
    return {name: counts for name, counts in found.items() if counts}


def check_name(model: nn.Module, config: IRDConfig, adapter_name: str) -> None:
    """Refuse an adapter with the name of an adapted parameter, or of a module around.

    PEFT takes every tensor with an adapter's name in its own for that adapter's, and
    leaves it out of the files of others.

    Args:
        model: The base model.
        config: The adapter's configuration, with its entries.
        adapter_name: Its name.

    Raises:
        ValueError: If its name, or that of one before it, is that of a parameter.
    """
    adapters = {adapter_name, *adapters_of(model)}
    patterns = [config.nnz_pattern or {}]
    patterns += [adapter_counts(model, name) for name in adapters]
    parts = {
        part
        for pattern in patterns
        for module, named in pattern.items()
        for part in (*module.split("."), *named)
    }
    for taken in adapters & {*parts, "base_model", "model"}:  # PEFT's modules around
        advice = "Choose another `adapter_name`."
        if taken != adapter_name:
            advice = "Leave its module out by `exclude_modules`."
        raise ValueError(
            f"An adapter cannot be called '{taken}': a parameter with entries is, or a "
            f"module around one, and files of other adapters would lose it. {advice}"
        )


def check_adapter_name(adapter_name: str) -> None:
    """Refuse what PEFT could not name modules by.

    Args:
        adapter_name: The adapter's name.

    Raises:
        ValueError: If modules cannot be called so.
    """
    try:
        nn.ModuleDict({adapter_name: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"An adapter cannot be called {adapter_name!r}: {error.args[0]}. Choose "
            "another `adapter_name`."
        ) from error


def install(
    model: nn.Module,
    config: IRDConfig,
    adapter_name: str,
    target: nn.Module,
    name: str,
) -> IRDLayer:
    """Give the adapter its entries in one module, which is wrapped if need be."""
    assert config.nnz_pattern is not None
    inner = _layer_in(target)
    layer = inner or _wrap_alike(model, target, name)
    if layer is not inner:
        layer.set_adapter([adapter_name])
    layer.update_layer(
        adapter_name,
        None if config.selection is None else config.selection.indices[name],
        config.nnz_pattern[name],
        init_weights=config.init_weights,
        inference_mode=config.inference_mode,
        numels=_numels(config, name),
        fingerprint=None
        if config.ignore_base_mismatch
        else (config.fingerprint or {}).get(name),
    )
    if layer is not inner:
        replace(model, target, layer)
    return layer


def _layer_in(module: Any) -> IRDLayer | None:
    """Return a module's layer, which another tuner's layer may be around."""
    while isinstance(module, BaseTunerLayer) and not isinstance(module, IRDLayer):
        module = module.base_layer
    return module if isinstance(module, IRDLayer) else None


def _numels(config: IRDConfig, name: str) -> dict[str, int]:
    shapes = (config.shape_pattern or {}).get(name, {})
    return {parameter: Size(shape).numel() for parameter, shape in shapes.items()}


def _wrap_alike(model: nn.Module, target: nn.Module, name: str) -> IRDLayer:
    """Wrap a module; adapters are on or off in it as in the rest of the model."""
    layer = wrap(target)
    layer.path = name
    others = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
    first = next(others, None)
    layer.enable_adapters(first is None or not first.disable_adapters)
    return layer


def adapters_of(model: nn.Module) -> list[str]:
    """Return the names of all adapters that have been announced."""
    layers = layers_of(model).values()
    return [*dict.fromkeys(name for layer in layers for name in layer.adapters)]


def announce(model: nn.Module, adapter_name: str) -> None:
    """Tell every layer of a model that there is an adapter.

    Args:
        model: The base model.
        adapter_name: The adapter.
    """
    names = [*dict.fromkeys([*adapters_of(model), adapter_name])]
    for layer in layers_of(model).values():
        layer.adapters = list(names)


def install_nested(
    model: nn.Module, config: IRDConfig, adapter_name: str, active: list[str]
) -> None:
    """Reach modules inside wrapped modules, which PEFT skips for further adapters."""
    missing = set(config.nnz_pattern or ()) - set(adapter_counts(model, adapter_name))
    with _flags_kept(model):
        for name in sorted(missing):
            target = model.get_submodule(name)
            layer = install(model, config, adapter_name, target, name)
            layer.set_adapter(active, config.inference_mode)


def as_named_here(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return saved tensors under the names that they have beside other adapters.

    Args:
        model: The model that they are for.
        tensors: What was saved, under the names of a model with that adapter alone.
    """
    layers: dict[str, str] = {}
    inside: dict[str, str] = {}  # of a layer the module that it is around
    for name, module in model.named_modules():
        if isinstance(module, IRDLayer):
            layers[plain_name(name)] = name
        inside[plain_name(name)] = name
    found = {}
    for key, tensor in tensors.items():
        path, *rest = key.partition(f".{PREFIX}")
        paths = layers
        if not any(rest):  # embeddings that are saved as well
            path, *rest = key.rpartition(".")
            is_around = ".base_layer" in path or plain_name(path) in layers
            paths = inside if is_around else {}
        is_here = plain_name(path) in paths
        found["".join([paths[plain_name(path)], *rest]) if is_here else key] = tensor
    return found


@contextmanager
def without_targets(model: nn.Module, config: IRDConfig) -> Iterator[None]:
    """Tell PEFT that no module is meant, where it could reach none of them.

    Args:
        model: The base model.
        config: The configuration, with its entries.
    """
    wrapped = {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    parents = {unwrapped_name(name) + "." for name in wrapped}
    names = config.nnz_pattern or {}
    targets = config.target_modules
    if names and all(any(map(name.startswith, parents)) for name in names):
        config.target_modules = DUMMY_TARGET_MODULES
    try:
        yield
    finally:
        config.target_modules = targets


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Leave the values that are there as trainable as they are."""
    flags = [(values, values.requires_grad) for values in _all_values(model)]
    try:
        yield
    finally:
        for values, flag in flags:
            values.requires_grad_(flag)


def share_tied(model: nn.Module) -> None:
    """Let each module that holds a selected parameter of others use their deltas."""
    holders: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, module in base_modules(model):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if name:
                holders[id(parameter)].append((name, parameter_name))
    for places in holders.values():
        owners = [(m, p) for m, p in _layers_at(model, places) if m.has_entries(p)]
        for name, held in places if owners and len(places) > 1 else ():
            module = model.get_submodule(name)
            layer = _layer_in(module)
            if layer is None:
                layer = _wrap_alike(model, module, name)
                layer.set_adapter(owners[0][0].active_adapters)
                replace(model, module, layer)
            for owner, owned in owners:
                if owner is not layer:
                    layer.share(held, owner, owned)


def _layers_at(
    model: nn.Module, places: list[tuple[str, str]]
) -> Iterator[tuple[IRDLayer, str]]:
    """Yield the modules that are layers, and the names of their parameters."""
    for name, parameter in places:
        layer = _layer_in(model.get_submodule(name))
        if layer is not None:
            yield layer, parameter


def resize(
    model: nn.Module, config: IRDConfig, adapter_name: str, counts: Counts
) -> None:
    """Make room for other entries than the adapter has; values are lost."""
    logger.warning(
        "Adapter '%s' has other entries in the file than in the model; it is resized. "
        "Create the optimizer after this, its parameters are new ones.",
        adapter_name,
    )
    base = base_model(model)
    layers = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
    active = layers[0].active_adapters if layers else [adapter_name]
    before = list(adapter_values(base, adapter_name))
    trainable = any(values.requires_grad for values in before)
    is_raised = any(values.dtype == torch.float32 for values in before)
    for layer in layers:
        if isinstance(layer, IRDLayer):
            layer.drop_entries(adapter_name)
    config.nnz_pattern, config.shape_pattern = counts, parameter_shapes(base, counts)
    config.fingerprint = None
    with _flags_kept(base):
        for name in counts:
            target = base.get_submodule(name)
            layer = install(base, config, adapter_name, target, name)
            layer.set_adapter(active)
    for values in adapter_values(base, adapter_name):
        values.requires_grad_(trainable)
        if is_raised and is_low_precision(values):  # as PEFT does when it injects
            values.data = values.data.float()
    share_tied(base)
    announce(base, adapter_name)


def _all_values(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, IRDLayer):
            yield from module.irdelta_values.parameters()


def adapter_values(model: nn.Module, adapter_name: str) -> Iterator[nn.Parameter]:
    """Yield the values of an adapter, layer by layer."""
    for layer in model.modules():
        if isinstance(layer, IRDLayer) and adapter_name in layer.irdelta_values:
            yield from layer.irdelta_values[adapter_name].parameters()
