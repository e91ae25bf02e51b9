"""The modules of a model: the base model's own, and the tuner's layers around them."""

from collections.abc import Iterator
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from peft_ird.layers.layer import IRDLayer
from peft_ird.sparse.storage import unwrapped_name

__all__ = ["base_model", "base_modules", "layers_of", "replace"]


def base_model(model: Any) -> nn.Module:
    """Return the model inside the wrappers of PEFT and the compiler, if any."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel | PeftMixedModel):
        model = model.base_model
    if isinstance(model, BaseTuner):
        model = model.model
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def base_modules(
    model: nn.Module, name: str = "", with_heads: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base model's modules under their names without any adapters.

    Args:
        model: A model, with or without adapters.
        name: The name to begin with.
        with_heads: Whether modules of which adapters have copies of their own
            (``modules_to_save``) are among them, as they came with the model.
    """
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if isinstance(module, AuxiliaryTrainingWrapper) and with_heads:
            module = module.original_module
        if isinstance(module, AuxiliaryTrainingWrapper) or id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from visit(child, unwrapped_name(f"{name}.{child_name}").strip("."))

    return visit(model, name)


def layers_of(model: nn.Module) -> dict[str, IRDLayer]:
    """Return a model's layers by the names that their modules have in the base model.

    Args:
        model: A base model, or PEFT's or the tuner's model around it.
    """
    return {
        unwrapped_name(name): module
        for name, module in base_model(model).named_modules()
        if isinstance(module, IRDLayer)
    }


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in another's place, under every parent that holds it."""
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if child is old and holder is not new:
                holder._modules[name] = new
