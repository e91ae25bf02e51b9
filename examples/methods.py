"""What is trained: the methods of the paper's Table 2, and some more, by name.

Each has the same budget of trained entries where it can be chosen, and the head beside
it. A builder takes a fresh model and returns it ready for the Trainer.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS,
)
from torch import nn

from peft_ird import Calibration, IRDConfig, Selection, select_parameters
from peft_ird.adapter.targets import find_candidates, is_in_head

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from diff_pruning import prune

__all__ = [
    "IRD_METHODS",
    "METHODS",
    "OWN_SIZE",
    "RATES",
    "SET_BY_PLAN",
    "Plan",
    "base_size",
    "built",
]


@dataclass(frozen=True)
class Plan:
    """What a method is given.

    Args:
        budget: Entries to train beside the head.
        calibration: The training samples.
        seed: Seed of whatever is drawn.
        fit: Trains a model, with an optimizer of its own if one is passed.
        options: Options of `IRDConfig`, for the methods that are it.
        rank: LoRA's; None for the one that fits the budget.
    """

    budget: int
    calibration: Calibration
    seed: int
    fit: Callable[..., None]
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None


@dataclass(frozen=True)
class Built:
    """A model to be trained, and the entries that were selected, if any."""

    model: nn.Module
    selection: Selection | None = None


def built(name: str, model: nn.Module, plan: Plan) -> Built:
    """Return a model that a method has changed for training.

    Args:
        name: A key of `METHODS`.
        model: A fresh model.
        plan: What the method is given.
    """
    return METHODS[name](model, plan)


def base_size(model: nn.Module) -> int:
    """Return the number of the model's parameters without its head."""
    config = IRDConfig(task_type="SEQ_CLS", density=1.0)
    return len(find_candidates(model, config))


def ird(model: nn.Module, plan: Plan, method: str) -> Built:
    """Select entries and train them by this package's tuner."""
    config = IRDConfig(
        task_type="SEQ_CLS",
        method=method,
        budget=plan.budget,
        seed=plan.seed,
        **{"target_modules": "all-linear", **plan.options},
    )
    config.selection = selection = select_parameters(model, config, plan.calibration)
    return Built(get_peft_model(model, config), selection)


def bias(model: nn.Module, plan: Plan) -> Built:
    """Train every bias, whatever the budget (BitFit)."""
    config = IRDConfig(task_type="SEQ_CLS", method="bias", seed=plan.seed)
    config.selection = selection = select_parameters(model, config)
    return Built(get_peft_model(model, config), selection)


def lora(model: nn.Module, plan: Plan) -> Built:
    """Train low-rank updates of PEFT's default modules."""
    targets = _default_targets(model)
    rank = plan.rank
    pattern: dict[str, int] = {}
    if rank is None:
        pattern = fitting_ranks(targets, plan.budget)
        rank = max(pattern.values())
    names = [*pattern] or [*targets]
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=names,
        rank_pattern={name: r for name, r in pattern.items() if r != rank},
        alpha_pattern={name: 2 * r for name, r in pattern.items() if r != rank},
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    return Built(get_peft_model(model, config))


def lora_everywhere(model: nn.Module, plan: Plan) -> Built:
    """Train updates of all linear layers, of rank 1 unless told otherwise.

    Rank 1 is the least, whatever the budget.
    """
    rank = plan.rank or 1
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    return Built(get_peft_model(model, config))


def fitting_ranks(targets: Mapping[str, nn.Module], budget: int) -> dict[str, int]:
    """Share a budget out among modules, one rank after the other from the top.

    Args:
        targets: The modules, in the model's order.
        budget: Trained entries that there may be at most.

    Returns:
        The rank of each module that gets one: alike, or one more in the upper layers.

    Raises:
        ValueError: If the budget is too small for one rank in one module.
    """
    costs = {name: sum(m.weight.shape) for name, m in reversed(targets.items())}
    ranks = dict.fromkeys(costs, 0)
    left = budget
    while left >= min(costs.values()):
        for name, cost in costs.items():
            if cost <= left:
                ranks[name] += 1
                left -= cost
    if not any(ranks.values()):
        raise ValueError(
            f"`budget` is {budget}, but one rank of one module has "
            f"{min(costs.values())} entries. Use a larger budget."
        )
    return {name: rank for name, rank in ranks.items() if rank}


def shira(model: nn.Module, plan: Plan) -> Built:
    """Train a random mask by SHiRA, of `nn.Linear` only.

    Its size is that of a LoRA: the largest one in the budget, at least of rank 1.
    """
    targets = _default_targets(model)
    per_rank = sum(sum(m.weight.shape) for m in targets.values())
    config = ShiraConfig(
        task_type="SEQ_CLS",
        r=max(1, plan.budget // per_rank),
        target_modules=[*targets],
        random_seed=plan.seed,
    )
    return Built(get_peft_model(model, config))


def supertuning(model: nn.Module, plan: Plan) -> Built:
    """Train the entries that Super-Tuning chooses, of `nn.Linear` only."""
    targets = _default_targets(model)
    entries = sum(m.weight.numel() for m in targets.values())
    config = SupertuningConfig(
        task_type="SEQ_CLS",
        target_modules=[*targets],
        sparsity=1 - plan.budget / entries,
    )
    return Built(get_peft_model(model, config))


def full(model: nn.Module, _: Plan) -> Built:
    """Train everything."""
    return Built(model)


def head_only(model: nn.Module, _: Plan) -> Built:
    """Train the head alone."""
    config = IRDConfig(task_type="SEQ_CLS", density=1.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_in_head(name.rpartition(".")[0], config))
    return Built(model)


def diff_pruning(model: nn.Module, plan: Plan) -> Built:
    """Learn which entries to change, then train those (Guo et al., 2021)."""
    selection, changes = prune(model, plan.budget, plan.fit)
    config = IRDConfig(task_type="SEQ_CLS", selection=selection, seed=plan.seed)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "irdelta_values" in name:
            module, _, rest = name.removeprefix("base_model.model.").partition(
                ".irdelta_values."
            )
            parameter.data.copy_(changes[module][rest.rpartition(".")[2]])
    return Built(adapted, selection)


def _default_targets(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that PEFT adapts by default, as query and value."""
    suffixes = DEFAULT_TARGETS.get(model.config.model_type)
    if suffixes is None:
        raise ValueError(
            f"PEFT has no default `target_modules` for {model.config.model_type!r}."
        )
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in suffixes
    }


# The best on MiniLM where benchmarks/glue_runs.py has found it, else where it begins.
RATES = {
    "ird": 1e-2,
    "reverse_ird": 1e-2,
    "fish": 3e-3,
    "gradient": 1e-2,
    "magnitude": 3e-2,
    "random": 3e-2,
    "bias": 3e-3,
    "diff_pruning": 1e-2,
    "lora": 1e-3,
    "lora-everywhere": 1e-3,
    "shira": 3e-2,
    "supertuning": 3e-2,
    "full": 3e-4,
    "head-only": 1e-1,
}
# What takes the options of IRDConfig, and which of them the plan sets.
IRD_METHODS = ("ird", "reverse_ird", "fish", "gradient", "magnitude", "random")
SET_BY_PLAN = ("budget", "calibration", "method", "seed", "selection", "task_type")
OWN_SIZE = ("bias", "full", "head-only", "lora-everywhere")  # whatever the budget
METHODS: dict[str, Callable[[nn.Module, Plan], Built]] = {
    **{name: partial(ird, method=name) for name in IRD_METHODS},
    "bias": bias,
    "diff_pruning": diff_pruning,
    "lora": lora,
    "lora-everywhere": lora_everywhere,
    "shira": shira,
    "supertuning": supertuning,
    "full": full,
    "head-only": head_only,
}
