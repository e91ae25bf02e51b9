"""Whoever trains a model's linear layers, or nothing: how each of them is built.

All have the same targets (`shapes.targets`), and heads and embeddings are frozen. A
builder takes a frozen model and returns it ready to be trained. `step.py` measures.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from shapes import BLOCKS, targets
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_ird import IRDConfig, Selection, select_parameters
from peft_ird.sparse.delta import index_dtype

# Fisher masks of up to 0.5 % were seen to use 3 to 30 % of the rows and 0.1 to 3 % of
# the columns; a quarter more than half of that area holds an entry.
CLUSTERED_UP_TO = 0.005
FILLED = 0.55
ROWS_PER_COLUMN = 10
SCATTERED = (0.9, 0.8)  # rows and columns in use beyond that density


@dataclass(frozen=True)
class Trainee:
    """A contestant.

    Args:
        name: A key of `BUILDERS`.
        density: Share of the targets' weights, for those who choose entries.
        seed: Seed of whatever is drawn.
    """

    name: str
    density: float | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        """Its name, with the density that it has."""
        if self.density is None:
            return self.name
        return f"{self.name} {100 * self.density:g} %"

    def build(self, model: nn.Module) -> nn.Module:
        """Return the model, changed in place, with what this one trains."""
        return BUILDERS[self.name](model, self)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    """Return the stock Trainer's optimizer of what is trained, if anything is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, fused=True) if trained else None


def trainees(names: list[str], densities: list[float], seed: int) -> list[Trainee]:
    """Return all contestants of some names, once per density where it matters."""
    return [
        Trainee(name, density, seed)
        for name in names
        for density in (densities if name in SPARSE else [None])
    ]


def floor(model: nn.Module, _: Trainee) -> nn.Module:
    """Train nothing, but take the gradient of the embeddings' output."""
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: output.requires_grad_(True)
    )
    return model


def full(model: nn.Module, _: Trainee) -> nn.Module:
    """Train the targets' weights."""
    for module in targets(model).values():
        module.weight.requires_grad_(True)
    return model


def bitfit(model: nn.Module, _: Trainee) -> nn.Module:
    """Train all biases of the blocks, those of norms too."""
    start = BLOCKS[model.config.model_type]
    for name, parameter in model.named_parameters():
        if name.startswith(start) and name.endswith(".bias"):
            parameter.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("This model has no biases.")
    return model


def ird(model: nn.Module, trainee: Trainee) -> nn.Module:
    """Train entries that lie as those of a Fisher mask."""
    selection = clustered(model, trainee.density, trainee.seed)
    return get_peft_model(model, IRDConfig(selection=selection))


def ird_random(model: nn.Module, trainee: Trainee) -> nn.Module:
    """Train random entries of the weights, of biases none."""
    selection = uniform(model, trainee.density, trainee.seed)
    return get_peft_model(model, IRDConfig(selection=selection))


def lora(model: nn.Module, _: Trainee, rank: int) -> nn.Module:
    """Train low-rank factors."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[*targets(model)],
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    return get_peft_model(model, config)


def lora_equal(model: nn.Module, trainee: Trainee) -> nn.Module:
    """Train factors of the rank that comes closest to as many parameters as IRD's."""
    weights = [module.weight for module in targets(model).values()]
    per_rank = sum(sum(weight.shape) for weight in weights)
    entries = trainee.density * sum(weight.numel() for weight in weights)
    return lora(model, trainee, max(1, round(entries / per_rank)))


def shira(model: nn.Module, trainee: Trainee) -> nn.Module:
    """Let SHiRA train the entries of `ird`, in place of its own multiples of a rank."""
    chosen = clustered(model, trainee.density, trainee.seed).indices
    config = ShiraConfig(r=1, target_modules=[*targets(model)], random_seed=0)
    adapted = get_peft_model(model, config)
    for name, entries in chosen.items():
        layer = adapted.base_model.model.get_submodule(name)
        weight = layer.get_base_layer().weight
        flat = entries["weight"].long().to(weight.device)
        places = torch.stack(torch.unravel_index(flat, weight.shape))
        layer.shira_indices["default"] = places.to(torch.int)
        layer.shira_weight["default"] = _zeros(layer.shira_weight["default"], flat)
    return adapted


def supertuning(model: nn.Module, trainee: Trainee) -> nn.Module:
    """Let Super-Tuning train the entries of `ird`, in place of the largest ones."""
    chosen = clustered(model, trainee.density, trainee.seed).indices
    config = SupertuningConfig(target_modules=[*targets(model)])
    adapted = get_peft_model(model, config)
    for name, entries in chosen.items():
        layer = adapted.base_model.model.get_submodule(name)
        values, flat = layer.supertuning_values["default"], entries["weight"]
        layer.supertuning_indices["default"] = flat.to(values.device)
        layer.supertuning_values["default"] = _zeros(values, flat)
    return adapted


def _zeros(like: Tensor, entries: Tensor) -> nn.Parameter:
    return nn.Parameter(like.new_zeros(entries.numel()))


BUILDERS: dict[str, Callable[[nn.Module, Trainee], nn.Module]] = {
    "floor": floor,
    "ird": ird,
    "ird-random": ird_random,
    "lora-1": partial(lora, rank=1),
    "lora-8": partial(lora, rank=8),
    "lora-64": partial(lora, rank=64),
    "lora-equal": lora_equal,
    "shira": shira,
    "supertuning": supertuning,
    "bitfit": bitfit,
    "full": full,
}
SPARSE = ("ird", "ird-random", "lora-equal", "shira", "supertuning")


def clustered(model: nn.Module, density: float, seed: int) -> Selection:
    """Return the same share of every weight, in few rows and fewer columns."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in targets(model).items():
        weight = module.weight
        is_transposed = isinstance(module, Conv1D)
        outputs, inputs = weight.shape[::-1] if is_transposed else weight.shape
        size = max(1, round(density * weight.numel()))
        rows, columns = lines_in_use(outputs, inputs, size, density, random)
        chosen = torch.randperm(len(rows) * len(columns), generator=random)[:size]
        places = rows[chosen // len(columns)], columns[chosen % len(columns)]
        first, second = reversed(places) if is_transposed else places
        found[name] = (first * weight.shape[1] + second).sort().values
    return _selection(model, found, "clustered", seed)


def lines_in_use(
    outputs: int, inputs: int, size: int, density: float, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the rows and the columns that hold all entries of a clustered mask."""
    shares = SCATTERED
    if density <= CLUSTERED_UP_TO:
        rows = math.sqrt(ROWS_PER_COLUMN * density / FILLED)
        shares = rows, rows / ROWS_PER_COLUMN
    columns = math.ceil(shares[1] * inputs)
    height = max(math.ceil(shares[0] * outputs), math.ceil(size / columns))
    return (
        torch.randperm(outputs, generator=random)[:height],
        torch.randperm(inputs, generator=random)[:columns],
    )


def uniform(model: nn.Module, density: float, seed: int) -> Selection:
    """Return what ``method="random"`` draws, without its entries in biases."""
    names = "|".join(re.escape(name) for name in targets(model))
    config = IRDConfig(
        method="random", density=density, target_modules=f"({names})", seed=seed
    )
    drawn = select_parameters(model, config)
    weights = {
        name: entries["weight"]
        for name, entries in drawn.indices.items()
        if "weight" in entries
    }
    return replace(_selection(model, weights, "random", seed), stages=drawn.stages)


def _selection(
    model: nn.Module, indices: dict[str, Tensor], method: str, seed: int
) -> Selection:
    weights = {name: module.weight for name, module in targets(model).items()}
    return Selection(
        indices={
            name: {"weight": flat.to(index_dtype(weights[name].numel()))}
            for name, flat in indices.items()
        },
        shapes={name: {"weight": tuple(weights[name].shape)} for name in indices},
        method=method,
        seed=seed,
        num_candidates=sum(weight.numel() for weight in weights.values()),
    )
