"""Kinds of layers: one per way in which a module uses its parameters."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_ird.layers.affine import Affine, Convolution, Norm
from peft_ird.layers.layer import Deltas, IRDLayer
from peft_ird.layers.lookups import Lookups
from peft_ird.layers.merging import is_low_precision
from peft_ird.layers.quantized import is_quantized, parameter_of
from peft_ird.layers.substitution import lending
from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.embedding import plus_rows, rows_of
from peft_ird.sparse.lending import unlent
from peft_ird.sparse.linear import linear
from peft_ird.sparse.ops import add_deltas
from peft_ird.sparse.separate import linear_and_product, plus_product
from peft_ird.sparse.ways import is_autocast, is_dense, way_in_force

__all__ = [
    "Affine",
    "Convolution",
    "CustomEmbedding",
    "CustomLinear",
    "Embedding",
    "Linear",
    "Norm",
    "QuantizedLinear",
    "TransposedLinear",
    "wrap",
]


_PLAIN = (Tensor, nn.Parameter)


class CustomEmbedding(Affine):
    """A subclass of ``nn.Embedding`` with a forward of its own, as one that scales."""

    _only_looks_up = True  # as far as has been seen

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        return base_layer.num_embeddings, base_layer.embedding_dim

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        is_eager = not (torch.compiler.is_compiling() or is_dense())
        if is_eager and self._only_looks_up and set(deltas) == {"weight"}:
            with Lookups(self.get_base_layer(), deltas["weight"]) as lookups:
                output = self.base_layer(*args, **kwargs)
            if lookups.are_all:
                return output
            self._only_looks_up = False
        return super()._run(deltas, *args, **kwargs)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_tied or torch.compiler.is_compiling() or is_dense():
            return super()._pass(*args, **kwargs)
        with Lookups(self.get_base_layer(), ()):  # without what a head has in the table
            return super()._pass(*args, **kwargs)


class Embedding(CustomEmbedding):
    """``nn.Embedding``: weight ``[tokens, o]``."""

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        is_plain = base.max_norm is None and not base.scale_grad_by_freq
        if not is_plain or not self._is_simple_call(deltas, args, kwargs):
            return super()._run(deltas, *args, **kwargs)

        def add(y: Tensor, ids: Tensor) -> Tensor:
            for delta in deltas["weight"]:
                y = plus_rows(y, ids, delta, base.padding_idx)
            return y

        return self._call_and(add, *args)

    def _run_base(self, x: Tensor) -> Tensor:
        base = self.get_base_layer()
        if not self._is_tied or base.weight.requires_grad or "forward" in vars(base):
            return super()._run_base(x)
        return rows_of(base.weight, x)


class Linear(Affine):
    """``nn.Linear``: weight ``[o, i]``, bias ``[o]``.

    Where nobody could notice, the delta is inside the weight for the moment of the
    product, which gives what a merged layer gives to the last bit. With low-precision
    weights, under autocast, or when something else takes part in the call of the base
    layer (another tuner, hooks, another device) it is a product of its own.
    """

    _is_transposed = False
    _input = "input"  # what its forward calls its argument

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        return base_layer.in_features, base_layer.out_features

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.keys() == {self._input}:
            args, kwargs = (kwargs[self._input],), {}
        has_weight = "weight" in deltas
        is_plain = not has_weight and not any(
            is_low_precision(self._base_parameter(name)) for name in deltas
        )
        if is_plain or not self._is_simple_call(deltas, args, kwargs):
            return super()._run(deltas, *args, **kwargs)
        if has_weight and self.is_applied_in_weight(*args):
            return self._run_in_weight(deltas, *args)
        if has_weight and self._is_one_product(deltas, *args):
            base, (delta,) = self.get_base_layer(), deltas["weight"]
            return linear_and_product(
                args[0], base.weight, base.bias, delta, self._is_transposed
            )

        return self._call_and(partial(self._with_shares, deltas), *args)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.keys() == {self._input}:
            args, kwargs = (kwargs[self._input],), {}
        is_shared = len(args) == 1 and not kwargs and self._is_alone()
        if torch.compiler.is_compiling() or is_dense() or not is_shared:
            return super()._pass(*args, **kwargs)
        return self._run_base(*args)

    def is_applied_in_weight(self, x: Tensor) -> bool:
        """Return whether the delta goes into the weight for the call with this input.

        Args:
            x: The input.
        """
        base = self.get_base_layer()
        if "forward" in base.__dict__ or not self._is_alone():
            return False  # what else takes part would be left out
        forced = way_in_force()
        if forced is not None:
            return forced == "in_weight"
        weight = base.weight  # under FSDP no parameter, but a view
        return (
            weight.dtype in {torch.float32, torch.float64}
            and x.dtype == weight.dtype
            and type(weight) in _PLAIN
            and not weight.requires_grad
            and not is_autocast(x.device.type)
        )

    def _run_base(self, x: Tensor) -> Tensor:
        base = self.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        is_own = type(weight) in _PLAIN and "forward" not in vars(base)
        is_own = is_own and not torch.compiler.is_compiling()
        with unlent(weight) if is_own else lending(base):
            return super()._run_base(x)

    def _is_one_product(self, deltas: Deltas, x: Tensor) -> bool:
        """Return whether one operator can be base layer and delta."""
        if len(deltas) > 1 or len(deltas["weight"]) > 1 or not self._is_alone():
            return False
        base = self.get_base_layer()
        weight, bias = base.weight, base.bias
        frozen = [weight] if bias is None else [weight, bias]
        return (
            "forward" not in base.__dict__
            and type(weight) in _PLAIN
            and not any(each.requires_grad for each in frozen)
            and all(each.dtype == x.dtype for each in frozen)
            and not is_autocast(x.device.type)
        )

    def _run_in_weight(self, deltas: Deltas, x: Tensor) -> Tensor:
        base = self.get_base_layer()
        bias = base.bias
        if "bias" in deltas:
            bias = add_deltas(bias, deltas["bias"])
        first, *others = deltas["weight"]
        y = linear(x, base.weight, bias, first, self._is_transposed)
        return self._with_products(y, x, others)

    def _with_shares(self, deltas: Deltas, y: Tensor, x: Tensor) -> Tensor:
        y = self._with_products(y, x, deltas.get("weight", ()))
        for delta in deltas.get("bias", ()):
            y = (y + delta.to_dense(delta.values.dtype)).to(y.dtype)
        return y

    def _with_products(
        self, y: Tensor, x: Tensor, deltas: Iterable[SparseDelta]
    ) -> Tensor:
        for delta in deltas:
            y = plus_product(y, x, delta, self._is_transposed)
        return y


class TransposedLinear(Linear):
    """``Conv1D``, the linear layer of GPT-2: weight ``[i, o]``, bias ``[o]``."""

    _is_transposed = True
    _input = "x"

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        return base_layer.nx, base_layer.nf


class CustomLinear(IRDLayer):
    """A subclass of ``nn.Linear`` with a forward of its own."""


class QuantizedLinear(Linear):
    """A linear layer with a coded weight: deltas are products of their own."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        if torch.compiler.is_compiling():
            return self._with_shares(deltas, self.base_layer(x), x)
        return self._call_and(partial(self._with_shares, deltas), x)

    def _with_products(
        self, y: Tensor, x: Tensor, deltas: Iterable[SparseDelta]
    ) -> Tensor:
        if not is_dense():
            return super()._with_products(y, x, deltas)
        for delta in deltas:
            dense = delta.to_dense(delta.values.dtype)
            y = (y + F.linear(x.to(dense.dtype), dense)).to(y.dtype)
        return y

    def _base_parameter(self, name: str) -> Tensor:
        parameter: Tensor = parameter_of(self.get_base_layer(), name)
        return parameter

    def parameter_in_force(self, name: str) -> Any:
        """Return a base parameter, the bias with its deltas, codes as they are."""
        if name == "weight":
            return self.get_base_layer().weight
        return super().parameter_in_force(name)


# Kinds that rely on what the base class computes; a subclass may compute otherwise.
_KINDS: list[tuple[type[nn.Module], type[IRDLayer]]] = [
    (nn.Linear, Linear),
    (Conv1D, TransposedLinear),
    (nn.Embedding, Embedding),
    (nn.LayerNorm, Norm),
    (nn.GroupNorm, Affine),
    (nn.Conv1d, Convolution),
    (nn.Conv2d, Convolution),
    (nn.Conv3d, Convolution),
]


def wrap(module: nn.Module) -> IRDLayer:
    """Return the layer kind that fits a module, around it.

    Args:
        module: A base module, or another tuner's layer around one.
    """
    base = module
    while isinstance(base, BaseTunerLayer):
        base = base.base_layer
    if is_quantized(base):
        return QuantizedLinear(module)
    if "weight" not in base._parameters:  # but made of others, as by weight_norm
        return IRDLayer(module)
    for known, kind in _KINDS:
        if isinstance(base, known) and type(base).forward is known.forward:
            return kind(module)
    if isinstance(base, nn.Linear):
        return CustomLinear(module)
    if isinstance(base, nn.Embedding):
        return CustomEmbedding(module)
    if type(base).__name__.endswith(("RMSNorm", "LayerNorm")):
        return Norm(module)
    return IRDLayer(module)
