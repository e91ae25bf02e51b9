"""Which entries an injection is to have, and whether they fit the model."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_ird.adapter.injection import FILE, Shapes, Source, parameter_shapes
from peft_ird.adapter.modules import base_model, base_modules, layers_of
from peft_ird.adapter.record import check_base, provenance
from peft_ird.adapter.targets import (
    check_names,
    is_in_head,
    resolve_targets,
    select_parameters,
)
from peft_ird.config import IRDConfig
from peft_ird.layers.quantized import parameter_of
from peft_ird.selection.criteria import METHODS
from peft_ird.selection.settings import rounded
from peft_ird.sparse.coding import pack
from peft_ird.sparse.storage import (
    CODED,
    VALUES,
    Entries,
    entry_counts,
    plain_name,
    unwrapped_name,
)

__all__ = ["check_sizes", "check_tied_heads", "fitted", "same_names", "settle"]

_SELECTION = Source("`selection`", "Select on this model with `select_parameters`.")


def settle(
    model: nn.Module, config: IRDConfig, state_dict: Mapping[str, Tensor] | None
) -> None:
    """Decide on the entries and write them into the config, or leave it untouched.

    Args:
        model: The base model; it is not changed.
        config: The configuration.
        state_dict: Saved tensors that tell which entries to make room for.

    Raises:
        ValueError: If data, options, a selection or a file do not fit the model.
    """
    _check_heads(model, config)
    settled: dict[str, Any] = {}
    if state_dict is not None:
        counts = entry_counts(state_dict)
        shapes = parameter_shapes(model, counts)
        settled["selection"] = None
    elif config.awaits_weights:
        assert config.nnz_pattern is not None
        counts = config.nnz_pattern
        shapes = parameter_shapes(model, counts)
        _check_shapes(shapes, config.shape_pattern or {})
        _check_types(model, counts)
        if config._entries is not None and not config.ignore_base_mismatch:
            check_base(model, config._entries, config.fingerprint or {})
        # The file's tensors are as large as these shapes say; rows may have been added.
        shapes = config.shape_pattern or shapes
        settled["_entries"] = None
    elif config.selection is None and not resolve_targets(model, config):
        config.nnz_pattern = config.shape_pattern = None
        return  # PEFT knows best what to say
    else:
        selection = config.selection or select_parameters(model, config)
        counts = selection.counts
        _check_outside_heads(counts, config)
        shapes = parameter_shapes(model, counts, _SELECTION)
        _check_shapes(shapes, selection.shapes, _SELECTION)
        selection.check()
        _check_size(config, len(selection), selection.num_candidates)
        if selection is config.selection and selection.method in METHODS:
            # The options of a selection of its own are not those of this one.
            settled |= {"method": selection.method, "seed": selection.seed}
        settled |= {"selection": selection, "fingerprint": None}
        settled["provenance"] = provenance(selection)
    for name, parameters in counts.items():
        check_names(name, parameters)
    check_tied_heads(model, config, counts)
    settled |= {"nnz_pattern": counts, "shape_pattern": shapes}
    for option, value in settled.items():
        setattr(config, option, value)


def fitted(
    tensors: Mapping[str, Tensor], entries: Entries, shapes: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return saved tensors with the sizes and types that the layers have.

    Args:
        tensors: Saved tensors in the present format.
        entries: The indices that are in them.
        shapes: Shapes that the layers' codes are sized for.
    """
    found = dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith(CODED):
            module = plain_name(key).removesuffix(CODED)
            indices = {name: at for name, (at, _) in entries[module].items()}
            numels = {name: math.prod(s) for name, s in shapes[module].items()}
            found[key] = pack(indices, numels)
        elif VALUES in key and tensor.dtype == torch.bfloat16:
            found[key] = tensor.float()
    return found


def check_sizes(model: nn.Module, entries: Entries, shapes: Shapes) -> None:
    """Refuse entries that were saved for parameters of other sizes.

    Only tables of tokens may have got rows since.

    Args:
        model: The model, with or without adapters.
        entries: What was saved.
        shapes: Shapes that they should be for.

    Raises:
        ValueError: If a size differs.
    """
    base: Any = base_model(model)
    modules = dict(base_modules(base))
    tables = [m for m in modules.values() if isinstance(m, nn.Embedding)]
    with suppress(AttributeError, NotImplementedError):
        tables.append(base.get_output_embeddings())
    growing = {id(p) for table in tables if table for p in table.parameters()}
    for module, named in entries.items():
        for name, (_, numel) in named.items():
            shape = shapes[module][name]
            may_grow = id(parameter_of(modules[module], name)) in growing
            before = [numel // shape[-1], *shape[1:]] if may_grow else []
            if numel != math.prod(shape) and not _fits(before, shape):
                raise ValueError(
                    f"The adapter was made for another base model: its "
                    f"'{module}.{name}' has {numel} weights, not the "
                    f"{math.prod(shape)} of shape {list(shape)}. Load the base model "
                    "that adapter_config.json names."
                )


def _check_size(config: IRDConfig, size: int, candidates: int) -> None:
    wanted = config.budget
    if config.density is not None:
        wanted = rounded(candidates, config.density)
    if wanted is not None and wanted != size:
        raise ValueError(
            f"`selection` has {size} entries, but `density` or `budget` asks for "
            f"{wanted}. Leave them out to use the selection as it is."
        )


def _check_heads(model: nn.Module, config: IRDConfig) -> None:
    """Refuse to train a module whole that has entries of another adapter in it."""
    for name, layer in layers_of(model).items():
        if is_in_head(name, config):
            owners = [o for each in layer._shared.values() for o, _ in each]
            has_own = any(map(layer.entry_counts, layer.irdelta_values))
            module = name if has_own or not owners else owners[0].path
            _refuse_head(name, module, new=name)


def check_tied_heads(
    model: nn.Module, config: IRDConfig, counts: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuse entries of a parameter that another adapter's head holds, too.

    A head that is trained whole computes with a copy, which no delta reaches.

    Args:
        model: The base model.
        config: The configuration of the adapter.
        counts: The adapter's entries.

    Raises:
        ValueError: If there is such a head.
    """
    heads = {
        id(parameter): unwrapped_name(name)
        for name, module in base_model(model).named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for parameter in module.original_module.parameters()
    }
    modules = dict(base_modules(base_model(model)))
    for module, names in counts.items():
        for name in names:
            head = heads.get(id(parameter_of(modules[module], name)))
            if head is not None and not is_in_head(head, config):
                _refuse_head(head, module, new=module)


def _refuse_head(head: str, module: str, new: str) -> None:
    tie = "" if head == module else f", which shares a parameter with '{module}'"
    raise ValueError(
        f"`modules_to_save` covers '{head}'{tie}, in which another adapter has "
        f"selected entries. Leave '{new}' out of the new adapter, or use a model "
        "without the other."
    )


def _check_outside_heads(counts: Mapping[str, Any], config: IRDConfig) -> None:
    for name in counts:
        if is_in_head(name, config):
            raise ValueError(
                f"`selection` has entries in '{name}', which belongs to a head that is "
                "trained whole. Select with the same `task_type` and `modules_to_save`."
            )


def same_names(counts: Mapping[str, Any], shapes: Mapping[str, Any]) -> bool:
    """Return whether two trees have the same parameters of the same modules.

    Args:
        counts: Anything per module and parameter.
        shapes: Anything per module and parameter.
    """

    def names(tree: Mapping[str, Any]) -> set[tuple[str, str]]:
        return {(module, name) for module, named in tree.items() for name in named}

    return names(counts) == names(shapes)


def _check_shapes(
    shapes: Shapes, expected: Mapping[str, Mapping[str, Any]], source: Source = FILE
) -> None:
    for module, parameters in expected.items():
        for name, shape in parameters.items():
            found = shapes.get(module, {}).get(name)
            if found is not None and not _fits(list(shape), found):
                raise ValueError(
                    f"{source.name} was made for another base model: its "
                    f"'{module}.{name}' has shape {list(shape)}, here it is {found}. "
                    f"{source.advice}"
                )


def _check_types(model: nn.Module, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse what has the shape of the weights but holds them in integers."""
    modules = dict(base_modules(base_model(model)))
    for module, names in counts.items():
        for name in names:
            dtype = parameter_of(modules[module], name).dtype
            if not dtype.is_floating_point:
                raise ValueError(
                    f"'{module}' is quantised (its '{name}' is {dtype}); deltas belong "
                    "to floating-point weights. Load the base model in bfloat16, or "
                    "merge the adapter and quantise what comes of it."
                )


def _fits(shape: list[int], found: list[int]) -> bool:
    """Return whether flat positions mean the same: rows may have been added."""
    has_more_rows = len(shape) == 2 and shape[1:] == found[1:] and shape[0] < found[0]
    return shape == found or has_more_rows
