"""The parameters that a configuration targets, and the selection among them."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from peft_ird._registration import include_all_linear_layers
from peft_ird.adapter.modules import base_model, base_modules
from peft_ird.adapter.shadows import Shadow, shadowed
from peft_ird.config import IRDConfig
from peft_ird.layers.merging import unmerge
from peft_ird.layers.quantized import is_quantized
from peft_ird.selection.calibration import Calibration
from peft_ird.selection.ird import Walk, walk
from peft_ird.selection.pool import Pool
from peft_ird.selection.selection import Selection
from peft_ird.sparse.storage import unwrapped_name

__all__ = [
    "check_names",
    "find_candidates",
    "is_in_head",
    "resolve_targets",
    "select_parameters",
    "select_stages",
]

# Their parameters are read by the parent.
_CONTAINERS = (
    nn.ParameterList,
    nn.ParameterDict,
    nn.utils.parametrize.ParametrizationList,
)
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def select_parameters(
    model: nn.Module,
    config: IRDConfig,
    calibration: Calibration | Any | None = None,
    memory_limit: int | None = None,
) -> Selection:
    """Choose the entries to train, as the config says; nothing is injected.

    Args:
        model: The base model, or a model that adapters were injected into; these are
            off while its entries are ranked. It comes back as it was: mode, gradients,
            ``requires_grad``, hooks and random state.
        config: The configuration; it is not changed.
        calibration: The data, where the method needs it. Default: the config's own.
        memory_limit: Bytes beyond the model for accumulators, activations and kept
            gradients. Default: the config's own.

    Returns:
        The selection, for ``get_peft_model(model, IRDConfig(selection=selection))``.

    Raises:
        ValueError: If the data, the options and the model do not fit each other.
    """
    return _walk(model, config, calibration, memory_limit).selection()


def select_stages(
    model: nn.Module,
    config: IRDConfig,
    calibration: Calibration | Any | None = None,
    memory_limit: int | None = None,
) -> tuple[Selection, ...]:
    """Choose entries as `select_parameters` does, and keep those of every cell.

    Args:
        model: As for `select_parameters`.
        config: The configuration; it is not changed.
        calibration: The data. Default: the config's own.
        memory_limit: Bytes beyond the model. Default: the config's own.

    Returns:
        The selections of one walk: that of each cell is what `select_parameters`
        would return for a schedule that ends there.
    """
    found = _walk(model, config, calibration, memory_limit)
    return tuple(found.selection(i + 1) for i in range(len(found.steps)))


def _walk(
    model: nn.Module, config: IRDConfig, calibration: Any, memory_limit: int | None
) -> Walk:
    if calibration is None:
        calibration = config.calibration
    if calibration is not None:
        calibration = Calibration.of(calibration)
    base = base_model(model)
    head = [
        parameter
        for name, module in base_modules(base, with_heads=True)
        if is_in_head(name, config)
        for parameter in module.parameters(recurse=False)
    ]
    limit = config.memory_limit if memory_limit is None else memory_limit
    find_candidates(base, config)  # raises before anything is touched
    with _adapters_off(base), shadowed(base, resolve_targets(base, config)):
        pool = find_candidates(base, config)
        return walk(base, pool, calibration, config, head, limit)


def find_candidates(model: nn.Module, config: IRDConfig) -> Pool:
    """Collect the parameters that a configuration targets.

    A parameter counts once, under its first name in ``named_parameters``. It is a
    candidate if a targeted module holds it and no head (``modules_to_save``) does.

    Args:
        model: The base model, with or without adapters.
        config: The configuration.

    Returns:
        The candidates, in ``named_parameters`` order.

    Raises:
        ValueError: If nothing is targeted, or what is, is sharded or quantised in a
            way that gives no gradients, or has no numbers that the method asks for.
    """
    targets = set(resolve_targets(model, config))
    owners: dict[int, tuple[str, str, nn.Parameter]] = {}
    targeted: set[int] = set()
    in_heads: set[int] = set()
    for name, module in base_modules(model):
        if name in targets and is_quantized(module) and config.method != "magnitude":
            module = Shadow(module)
        if name in targets:
            _check_plain(name, module)
            check_names(name, [n for n, _ in module.named_parameters(recurse=False)])
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if name:  # the model itself cannot be replaced inside its parent
                owners.setdefault(id(parameter), (name, parameter_name, parameter))
            if name in targets:
                targeted.add(id(parameter))
            if is_in_head(name, config):
                in_heads.add(id(parameter))
    chosen = targeted - in_heads
    pool = Pool(owner for key, owner in owners.items() if key in chosen)
    if len(pool) == 0:
        raise ValueError(
            f"No parameters to choose from: `target_modules` {config.target_modules} "
            "matches no module with parameters of its own. Look at the names in "
            "model.named_modules()."
        )
    return pool


def resolve_targets(model: nn.Module, config: IRDConfig) -> list[str]:
    """Return the names of the targeted modules, in the model's order.

    Args:
        model: The base model, with or without adapters.
        config: The configuration; it is not changed.

    Raises:
        ValueError: If ``target_modules`` is given and matches no module.
    """
    probe = copy.copy(config)
    probe.modules_to_save = [*_heads(config)]
    include_all_linear_layers(probe, model)
    if isinstance(probe.target_modules, set):
        probe.target_modules = {unwrapped_name(name) for name in probe.target_modules}
        if isinstance(config.target_modules, str):  # PEFT looks into no layer for them
            probe.target_modules |= _linear_layers_within(model)
    named = [(name, m) for name, m in base_modules(model) if name]
    if config.target_modules is None:
        names = [name for name, module in named if _holds_parameters(module)]
        probe.target_modules = set(_in_layers(names, config))
    return [name for name, _ in named if check_target_module_exists(probe, name)]


def _linear_layers_within(model: nn.Module) -> set[str]:
    """Return the linear layers inside modules that other adapters have wrapped."""
    modules = model.named_modules()
    wrapped = {unwrapped_name(n) for n, m in modules if isinstance(m, BaseTunerLayer)}
    return {
        name
        for name, module in base_modules(model)
        if isinstance(module, nn.Linear | Conv1D)
        and not wrapped.isdisjoint([*accumulate(name.split("."), "{}.{}".format)][:-1])
    }


def is_in_head(name: str, config: IRDConfig) -> bool:
    """Return whether a module belongs to a head that is trained whole.

    PEFT trains each module whole whose name ends in a head's: ``pre_classifier``, too.

    Args:
        name: The module's name in the base model.
        config: The configuration.
    """
    around = accumulate(name.split("."), "{}.{}".format)
    return any(outer.endswith(_heads(config)) for outer in around)


def _heads(config: IRDConfig) -> tuple[str, ...]:
    return (*(config.modules_to_save or ()), *_HEADS.get(config.task_type, ()))


def _in_layers(names: list[str], config: IRDConfig) -> list[str]:
    """Return the names inside the layers that the configuration asks for, if any."""
    if config.layers_to_transform is None:
        return names
    probe = copy.copy(config)
    probe.exclude_modules = probe.modules_to_save = None
    # PEFT looks at layers only where a suffix matched: the dot makes each name one.
    probe.target_modules = {name.rpartition(".")[2] for name in names}
    return [name for name in names if check_target_module_exists(probe, f".{name}")]


def _holds_parameters(module: nn.Module) -> bool:
    has_own = next(module.named_parameters(recurse=False), None) is not None
    return is_quantized(module) or (has_own and not isinstance(module, _CONTAINERS))


def check_names(module: str, parameters: Iterable[str]) -> None:
    """Refuse parameters that no container of torch's could hold under their names.

    Args:
        module: The module's name.
        parameters: Names of its parameters.

    Raises:
        ValueError: If one is called like a method of theirs.
    """
    for name in parameters:
        if hasattr(nn.ParameterDict, name):
            raise ValueError(
                f"'{module}.{name}' cannot be adapted: parameters called '{name}' "
                "cannot be kept in a dictionary of parameters. Leave the module out by "
                "`exclude_modules`."
            )


def _check_plain(name: str, module: nn.Module) -> None:
    """Refuse weights whose entries are not the ones that the model computes with."""
    packed = [n for n in ("qweight", "W_q", "quant_state") if hasattr(module, n)]
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"'{name}.{parameter_name}' is sharded over devices; entries can only "
                "be selected in whole weights. Select on an unsharded model and pass "
                "`selection=`."
            )
        if parameter.is_meta:
            raise ValueError(
                f"'{name}.{parameter_name}' is offloaded or was never loaded: it is on "
                "the meta device. Select on a model that is at hand and pass "
                "`selection=`."
            )
        if not parameter.is_floating_point():
            packed.append(f"{parameter_name} ({parameter.dtype})")
    if packed:
        raise ValueError(
            f"'{name}' is quantised (it has {', '.join(packed)}); entries can only be "
            "selected in floating-point weights. Select on the unquantised model, or "
            "leave the module out with `exclude_modules`."
        )


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    states = [
        (layer, layer.disable_adapters, list(getattr(layer, "merged_adapters", ())))
        for layer in layers
    ]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        unmerge(layer for layer, _, merged in states if merged)
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, disabled, merged in states:
            if merged:
                layer.merge(adapter_names=merged)
            layer.enable_adapters(not disabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
