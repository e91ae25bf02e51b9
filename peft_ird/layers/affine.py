"""Layers whose output is affine in their parameters, and what they share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peft_ird.layers.layer import Deltas, IRDLayer
from peft_ird.layers.merging import is_low_precision
from peft_ird.layers.substitution import with_forward, with_parameters
from peft_ird.sparse.ops import sum_dense
from peft_ird.sparse.ways import is_autocast, is_dense, no_autocast

__all__ = ["Affine", "Convolution", "Norm"]


class Affine(IRDLayer):
    """A layer whose output is affine in its parameters, as norms and convolutions.

    With low-precision weights most small deltas would be lost in the sum (of deltas of
    1e-4 a third, in bfloat16), and offloaded weights are not at hand; there the share
    that the deltas have in the output is added instead.
    """

    _gives_tensors = True  # as far as has been seen

    def _run(self, deltas: Deltas, *args: Any, **kwargs: Any) -> Any:
        weights = [self._base_parameter(name) for name in deltas]
        if not (any(map(self._is_coarse, weights)) and self._gives_tensors):
            return super()._run(deltas, *args, **kwargs)
        dense = {
            name: sum_dense(found, torch.float32) for name, found in deltas.items()
        }

        # A compiler runs hooks on the share, too, and takes no copy of the module.
        is_whole = torch.compiler.is_compiling() or self._is_alone()
        call = self.base_layer if is_whole else self.get_base_layer().forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if not isinstance(output, Tensor):  # norms of integers give a scale, too
                self._gives_tensors = False
                return output
            return output + self._output_share(dense, *args, **kwargs).to(output.dtype)

        layer = run if is_whole else with_forward(self.base_layer, run)
        output = layer(*args, **kwargs)
        return output if self._gives_tensors else super()._run(deltas, *args, **kwargs)

    def _is_coarse(self, weight: Tensor) -> bool:
        """Return whether a parameter cannot take a delta, or not without losing it."""
        return weight.is_meta or is_low_precision(weight)

    def _is_simple_call(
        self, deltas: Deltas, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Return whether the operators for sparse deltas can serve a call."""
        is_broken = torch.compiler.is_compiling() and not self._is_alone()
        has_one = _has_one_input(args, kwargs, deltas)
        return has_one and not is_broken and not is_dense()

    def _is_alone(self) -> bool:
        """Return whether the base layer has neither hooks nor another tuner on it."""
        base = self.get_base_layer()
        return base is self.base_layer and not _has_hooks(base)

    def _call_and(self, add: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """Add to the base layer's output what hooks and other tuners see as its own."""
        if self._is_alone():
            return add(self._run_base(x), x)
        layer = with_forward(self.base_layer, lambda x: add(self._run_base(x), x))
        output: Tensor = layer(x)
        return output

    def _run_base(self, x: Tensor) -> Tensor:
        """Run the base layer without its hooks."""
        output: Tensor = self.get_base_layer().forward(x)
        return output

    def _output_share(
        self, dense: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return what dense deltas add to the output: f(delta) - f(0), in float32.

        The difference may be small beside its terms, as in norms that multiply by
        1 + weight.
        """
        base = self.get_base_layer()
        device = next(iter(dense.values())).device
        held = {name: getattr(base, name) for name in self._names}
        zeros = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=device)
            for name, parameter in held.items()
            if parameter is not None
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

        with no_autocast(device.type):
            return output({**zeros, **dense}) - output(zeros)


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class Convolution(Affine):
    """Convolutions, which autocast computes in 16 bits."""

    def _is_coarse(self, weight: Tensor) -> bool:
        return super()._is_coarse(weight) or is_autocast(weight.device.type)


class Norm(Affine):
    """LayerNorm, RMSNorm and their kin."""

    @staticmethod
    def _features(base_layer: Any) -> tuple[int | None, int | None]:
        weight = getattr(base_layer, "weight", None)
        size = None if weight is None else weight.numel()
        return size, size


def _has_one_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], deltas: Deltas
) -> bool:
    """Return whether a layer is called with one tensor, where its deltas are."""
    device = next(iter(deltas.values()))[0].values.device
    return (
        not kwargs
        and len(args) == 1
        and isinstance(args[0], Tensor)
        and args[0].device == device
    )


def _has_hooks(module: nn.Module) -> bool:
    return any(
        getattr(module, hooks)
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )
