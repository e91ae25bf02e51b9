"""Adapters made into one: the entries of all of them, and values by a rule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge
from torch import Tensor, nn

from peft_ird.adapter.modules import layers_of
from peft_ird.config import IRDConfig
from peft_ird.layers.layer import IRDLayer
from peft_ird.selection.selection import Selection
from peft_ird.sparse.delta import SparseDelta

__all__ = ["Combination", "add_combined"]

_PRUNES = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
_ELECTS = ("ties", "dare_ties")
RULES = ("linear", *_PRUNES)

Named = dict[str, dict[str, SparseDelta]]


@dataclass(frozen=True)
class Combination:
    r"""A rule that makes several deltas into one, entry by entry.

    ``"linear"`` is their weighted sum :math:`\sum_a w_a \Delta_a`, which is exact, as
    there is no rank to keep to. The others first keep a share of each delta's entries,
    the largest (``"magnitude_prune"``, ``"ties"``) or random ones, scaled up for those
    left out (``"dare_linear"``, ``"dare_ties"``; Yu et al., 2024, arXiv:2311.03099).
    With ties (Yadav et al., 2023, arXiv:2306.01708) an entry is the mean of those that
    have the sign of the majority.

    Args:
        adapters: Names of the adapters.
        weights: One for each; may be negative.
        rule: One of `RULES`.
        density: Share of each parameter's entries to keep, in (0, 1], at least one;
            `"linear"` takes them all.
        majority_sign_method: The majority by ``"total"`` value or ``"frequency"``.

    Raises:
        ValueError: If an argument does not fit.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    rule: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if not self.adapters or len({*self.adapters}) < len(self.adapters):
            raise ValueError(
                f"`adapters` must name distinct adapters, got {self.adapters}."
            )
        if len(self.weights) != len(self.adapters):
            raise ValueError(
                f"`weights` must have one weight for each of {len(self.adapters)} "
                f"adapters, got {len(self.weights)}."
            )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"`weights` must be finite, got {self.weights}.")
        if self.rule not in RULES:
            raise ValueError(
                f"`combination_type` must be one of {', '.join(map(repr, RULES))}, got "
                f"{self.rule!r}. Sparse deltas have no rank: 'linear' is exact."
            )
        density = self.density
        if self.rule in _PRUNES and (density is None or not 0 < density <= 1):
            raise ValueError(
                f"`density` must be in (0, 1] for `combination_type={self.rule!r}`, "
                f"the share of each parameter's entries to keep; got {density!r}."
            )
        if self.majority_sign_method not in {"total", "frequency"}:
            raise ValueError(
                "`majority_sign_method` must be 'total' or 'frequency', got "
                f"{self.majority_sign_method!r}."
            )

    def of(
        self, deltas: Mapping[str, SparseDelta], random: torch.Generator
    ) -> SparseDelta:
        """Combine the deltas of one parameter.

        Args:
            deltas: By adapter; some may have none.
            random: Draws what is dropped.

        Returns:
            A delta with every entry that one of them has; the highest of their types.
        """
        first = next(iter(deltas.values()))
        types = [delta.values.dtype for delta in deltas.values()]
        kept_type = reduce(torch.promote_types, types)
        indices = torch.cat([delta.indices for delta in deltas.values()]).unique()
        dtype = torch.promote_types(kept_type, torch.float32)
        rows = first.values.new_zeros(len(deltas), len(indices), dtype=dtype)
        for row, delta in zip(rows, deltas.values(), strict=True):
            kept = self._pruned(delta.values.detach().to(dtype), random)
            row[torch.searchsorted(indices, delta.indices)] = kept
        weights = dict(zip(self.adapters, self.weights, strict=True))
        weighted = rows * rows.new_tensor([weights[name] for name in deltas])[:, None]
        if self.rule in _ELECTS:
            majority = calculate_majority_sign_mask(rows, self.majority_sign_method)
            values = disjoint_merge(weighted, majority)
        else:
            values = weighted.sum(0)
        return SparseDelta(indices, values.to(kept_type), first.shape)

    def _pruned(self, values: Tensor, random: torch.Generator) -> Tensor:
        """Return values, with zeros in place of those that are not kept."""
        if self.density is None or self.rule not in _PRUNES:
            return values
        if not self.rule.startswith("dare"):
            count = int(self.density * len(values))
            count = min(len(values), max(1, count))  # small biases have one
            largest = values.abs().topk(count).indices
            return torch.zeros_like(values).index_copy_(0, largest, values[largest])
        chance = torch.rand(len(values), generator=random, device="cpu").to(
            values.device
        )
        return torch.where(chance < self.density, values / self.density, 0.0)


def add_combined(tuner: BaseTuner, adapter_name: str, rule: Combination) -> None:
    """Put a combination into the model that its adapters are in.

    Args:
        tuner: The tuner that has the adapters; changed in place.
        adapter_name: Name of the new adapter, which is frozen.
        rule: The adapters, and how they are combined.

    Raises:
        ValueError: If an adapter is not there, the new name is taken, or several have
            a head of their own; nothing has been changed by then.
    """
    for adapter in rule.adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(
                f"Adapter {adapter} does not exist; there are "
                f"{', '.join(tuner.peft_config)}."
            )
    if adapter_name in tuner.peft_config:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
    sources = _sources_of_heads(tuner.model, rule.adapters)
    seed = tuner.peft_config[rule.adapters[0]].seed
    deltas = _combined(layers_of(tuner.model), rule, seed)
    tuner.peft_config[adapter_name] = _config(deltas, rule, tuner.peft_config)
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        tuner.peft_config.pop(adapter_name, None)
        raise
    for module, layer in layers_of(tuner.model).items():
        for name, delta in deltas.get(module, {}).items():
            values = layer.irdelta_values[adapter_name][name].requires_grad_(False)
            values.data = delta.values
    for head, source in sources.items():
        state = head.modules_to_save[source].state_dict()
        head.modules_to_save[adapter_name].load_state_dict(state)
    weights = dict(zip(rule.adapters, map(float, rule.weights), strict=True))
    tuner.peft_config[adapter_name].provenance["adapters"] = weights


def _sources_of_heads(
    model: nn.Module, adapters: Sequence[str]
) -> dict[ModulesToSaveWrapper, str]:
    """Return which adapter has modules of its own, where one has."""
    sources = {}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            found = [name for name in adapters if name in module.modules_to_save]
            if len(found) > 1:
                raise ValueError(
                    "Cannot add weighted adapters if they target the same module with "
                    f"modules_to_save, but {', '.join(found)} do."
                )
            if found:
                sources[module] = found[0]
    return sources


def _combined(layers: Mapping[str, IRDLayer], rule: Combination, seed: int) -> Named:
    random = torch.Generator().manual_seed(seed)
    found: Named = {}
    for module, layer in layers.items():
        counts = {adapter: layer.entry_counts(adapter) for adapter in rule.adapters}
        for name in dict.fromkeys(name for names in counts.values() for name in names):
            owners = [adapter for adapter, names in counts.items() if name in names]
            deltas = {adapter: layer._delta(adapter, name) for adapter in owners}
            found.setdefault(module, {})[name] = rule.of(deltas, random)
    return found


def _config(
    deltas: Named, rule: Combination, configs: Mapping[str, IRDConfig]
) -> IRDConfig:
    """Return a configuration whose selection are the entries of a combination."""
    heads = [name for a in rule.adapters for name in configs[a].modules_to_save or ()]
    first = configs[rule.adapters[0]]
    selection = Selection(
        indices={
            m: {n: d.indices.cpu() for n, d in p.items()} for m, p in deltas.items()
        },
        shapes={
            m: {n: tuple(d.shape) for n, d in p.items()} for m, p in deltas.items()
        },
        method=rule.rule,
        seed=first.seed,
    )
    return IRDConfig(
        selection=selection,
        modules_to_save=[*dict.fromkeys(heads)] or None,
        **{name: getattr(first, name) for name in _TAKEN_OVER},
    )


# What is no choice of entries, of the first adapter.
_TAKEN_OVER = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "method",
    "seed", "save_dtype",
)  # fmt: skip
