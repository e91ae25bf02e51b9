"""Diff pruning (Guo, Rush and Kim, 2021, arXiv:2012.07463), a baseline.

The change of each weight is w z with a gate z that may close: a hard concrete variable
(Louizos et al., 2018), whose probability to be open is the penalty. After training, the
k largest expected changes stay, and only they are trained further.

The gates make three numbers of every weight, and the whole takes two trainings where
other methods take one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peft_ird import IRDConfig, Selection
from peft_ird.adapter.targets import find_candidates, is_in_head
from peft_ird.sparse.delta import index_dtype

__all__ = ["prune"]

# All but the last as in the authors' experiments.
LOW, HIGH, TEMPERATURE = -1.5, 1.5, 1.0  # of the hard concrete distribution
PENALTY = 1.25e-7  # on each open gate
START = 5.0  # log odds of the gates: open
GATE_RATE = 0.1  # learning rate of the gates
GATE_EPS = 1e-15  # Adam's own would outweigh the penalty, and short trainings end open

Changes = dict[str, dict[str, Tensor]]


class GatedChange(nn.Module):
    """The parametrization W + w z.

    Args:
        weight: The pretrained weight. Any shape.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight))
        self.log_odds = nn.Parameter(torch.full_like(weight, START))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with a sample of the gates, or with their expectation."""
        if not self.training:
            return weight + self.expected()
        noise = torch.rand_like(weight).clamp(1e-6, 1 - 1e-6).logit()
        return weight + self.change * _stretched((noise + self.log_odds) / TEMPERATURE)

    def expected(self) -> Tensor:
        """Return the change without noise. Shape of the weight."""
        return self.change * _stretched(self.log_odds)

    def open_gates(self) -> Tensor:
        """Return the expected number of gates that are not closed. A scalar."""
        shift = TEMPERATURE * math.log(-LOW / HIGH)
        return torch.sigmoid(self.log_odds - shift).sum()


def prune(
    model: nn.Module, budget: int, fit: Callable[..., None]
) -> tuple[Selection, Changes]:
    """Learn which entries of the linear layers to change.

    The model comes back as it was, but for its head, which stays trained.

    Args:
        model: A fresh model, for sequence classification.
        budget: Entries to keep.
        fit: Trains a model; takes the optimizer's groups of parameters as ``groups``,
            that of the gates with an ``"lr"`` and an ``"eps"`` of its own.

    Returns:
        The entries, and the changes that they were left with.
    """
    config = IRDConfig(task_type="SEQ_CLS", density=1.0, target_modules="all-linear")
    pool = find_candidates(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with _gated(model, pool.names, config) as gates:
        trained = [p for p in model.parameters() if p.requires_grad]
        odds = {id(gate.log_odds) for gate in gates.values()}
        fit(
            model,
            groups=[
                {"params": [p for p in trained if id(p) not in odds]},
                {
                    "params": [gate.log_odds for gate in gates.values()],
                    "lr": GATE_RATE,
                    "eps": GATE_EPS,
                },
            ],
        )
        found = {key: gate.expected().detach() for key, gate in gates.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_in_head(name.rpartition(".")[0], config):
                parameter.copy_(before[name])
    return _largest(found, budget)


@contextmanager
def _gated(
    model: nn.Module, names: list[tuple[str, str]], config: IRDConfig
) -> Iterator[dict[tuple[str, str], GatedChange]]:
    """Give the named parameters gated changes, and the model's loss their penalty."""
    gates: dict[tuple[str, str], GatedChange] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module, name in names:
        owner = model.get_submodule(module)
        gate = GatedChange(getattr(owner, name).detach())
        parametrize.register_parametrization(owner, name, gate)
        gates[module, name] = gate
    for name, parameter in model.named_parameters():
        if is_in_head(name.rpartition(".")[0], config):
            parameter.requires_grad_(True)

    def penalise(
        _module: nn.Module, _inputs: object, output: dict[str, Tensor]
    ) -> None:
        if model.training and output.get("loss") is not None:
            open_gates = sum(gate.open_gates() for gate in gates.values())
            output["loss"] = output["loss"] + PENALTY * open_gates

    hook = model.register_forward_hook(penalise)
    try:
        yield gates
    finally:
        hook.remove()
        for module, name in names:
            owner = model.get_submodule(module)
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)


def _stretched(log_odds: Tensor) -> Tensor:
    """Return the gates: a logistic function, stretched beyond [0, 1] and cut off."""
    return (torch.sigmoid(log_odds) * (HIGH - LOW) + LOW).clamp(0, 1)


def _largest(
    changes: dict[tuple[str, str], Tensor], budget: int
) -> tuple[Selection, Changes]:
    """Return the entries with the largest changes, and these changes."""
    sizes = torch.cat([change.abs().flatten() for change in changes.values()])
    chosen = sizes.topk(budget).indices.sort().values
    indices: Changes = {}
    kept: Changes = {}
    start = 0
    for (module, name), change in changes.items():
        flat = chosen[(chosen >= start) & (chosen < start + change.numel())] - start
        start += change.numel()
        if len(flat):
            dtype = index_dtype(change.numel())
            indices.setdefault(module, {})[name] = flat.to(dtype)
            kept.setdefault(module, {})[name] = change.flatten()[flat]
    selection = Selection(
        indices=indices,
        shapes={
            module: {name: tuple(changes[module, name].shape) for name in named}
            for module, named in indices.items()
        },
        method="diff_pruning",
        num_candidates=len(sizes),
    )
    return selection, kept
