"""Kinds of layers: one per way in which a module uses its parameters."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from peft_ird.layer import Deltas, IRDLayer
from peft_ird.merging import is_low_precision
from peft_ird.sparse.ops import sum_dense
from peft_ird.substitution import with_parameters

__all__ = [
    "Affine",
    "CustomLinear",
    "Embedding",
    "Linear",
    "Norm",
    "TransposedLinear",
    "wrap",
]


class Affine(IRDLayer):
    """A layer whose output is affine in its parameters, as norms and convolutions.

    With low-precision weights most small deltas would be lost in the sum (of deltas of
    1e-4 a third, in bfloat16), and offloaded weights are not at hand; there the share
    that the deltas have in the output is added instead.
    """

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        weights = [self._base_parameter(name) for name in deltas]
        if not any(is_low_precision(w) or w.is_meta for w in weights):
            return super()._run(deltas, *args, **kwargs)
        output = self.base_layer(*args, **kwargs)
        dense = {
            name: sum_dense(found, torch.float32) for name, found in deltas.items()
        }
        return output + self._output_share(dense, *args, **kwargs).to(output.dtype)

    def _output_share(
        self, dense: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return what dense deltas add to the output: f(delta) - f(0), in float32.

        The difference may be small beside its terms, as in norms that multiply by
        1 + weight.
        """
        base = self.get_base_layer()
        device = next(iter(dense.values())).device
        zeros = {
            name: torch.zeros(parameter.shape, device=device)
            for name, parameter in base.named_parameters(recurse=False)
        }
        args, kwargs = tree_map_only(Tensor, _raised, (args, kwargs))

        def output(parameters: Mapping[str, Tensor]) -> Tensor:
            result: Tensor
            if torch.compiler.is_compiling():
                result = torch.func.functional_call(
                    base, dict(parameters), args, kwargs
                )
            else:  # the class's own forward: hooks have run on the base layer already
                clone = with_parameters(base, parameters)
                result = type(base).forward(clone, *args, **kwargs)
            return result

        return output({**zeros, **dense}) - output(zeros)


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class Norm(Affine):
    """LayerNorm, RMSNorm and their kin."""

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        weight = getattr(base_layer, "weight", None)
        size = None if weight is None else weight.numel()
        return size, size


class Embedding(Affine):
    """``nn.Embedding``: weight ``[tokens, o]``."""

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        return base_layer.num_embeddings, base_layer.embedding_dim


class Linear(Affine):
    """``nn.Linear``: weight ``[o, i]``, bias ``[o]``."""

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        return base_layer.in_features, base_layer.out_features

    def _output_share(self, dense: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if "weight" not in dense:
            return dense["bias"]
        return self._multiply(x, dense["weight"], dense.get("bias"))

    @staticmethod
    def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x), None if bias is None else bias.to(x))


class TransposedLinear(Linear):
    """``Conv1D``, the linear layer of GPT-2: weight ``[i, o]``, bias ``[o]``."""

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        return base_layer.nx, base_layer.nf

    @staticmethod
    def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return Linear._multiply(x, weight.T, bias)


class CustomLinear(IRDLayer):
    """A subclass of ``nn.Linear`` with a forward of its own."""


# Kinds that rely on what the base class computes; a subclass may compute otherwise.
_KINDS: list[tuple[type[nn.Module], type[IRDLayer]]] = [
    (nn.Linear, Linear),
    (Conv1D, TransposedLinear),
    (nn.LayerNorm, Norm),
    (nn.Conv1d, Affine),
    (nn.Conv2d, Affine),
    (nn.Conv3d, Affine),
]


def wrap(module: nn.Module) -> IRDLayer:
    """Return the layer kind that fits a module, around it.

    Args:
        module: A base module, or another tuner's layer around one.
    """
    base = module
    while isinstance(base, BaseTunerLayer):
        base = base.base_layer
    for known, kind in _KINDS:
        if isinstance(base, known) and type(base).forward is known.forward:
            return kind(module)
    if isinstance(base, nn.Linear):
        return CustomLinear(module)
    if isinstance(base, nn.Embedding):
        return Embedding(module)
    if type(base).__name__.endswith("RMSNorm"):
        return Norm(module)
    return IRDLayer(module)
