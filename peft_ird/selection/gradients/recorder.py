"""What the substitutes of a parameter's uses leave behind, gathered by parameter."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_ird.selection.gradients.dense import Dense
from peft_ird.selection.gradients.forms import SampleGradients, combine
from peft_ird.selection.gradients.outer import Outer
from peft_ird.selection.gradients.picked import Picked
from peft_ird.selection.gradients.rows import Rows

__all__ = ["Observer", "Recorder", "apply"]

Observer = Callable[[int, SampleGradients], None]


class Recorder:
    """Collects per-sample gradients, use by use, and passes them on when complete.

    Args:
        parameters: The parameters by number; none of them requires a gradient.
        size: Number of samples in the batch.
        widths: Rows that a sample has where a batch is flattened; one is always
            allowed.
        device: The model's device.
        observe: Called with a parameter's number and its gradients as soon as the
            backward pass is through with the parameter.
        scale: Factor on the loss that keeps low-precision gradients from underflow;
            what is handed out is free of it.
        tables: As for `Picked`.
        rows: Rows of the batch if they are not samples, but choices of samples.
    """

    def __init__(
        self,
        parameters: Mapping[int, nn.Parameter],
        size: int,
        widths: Collection[int],
        device: torch.device,
        observe: Observer,
        scale: float = 1.0,
        tables: Collection[int] = (),
        rows: int | None = None,
    ) -> None:
        self.size = size
        self.rows_of_batch = rows or size
        self.widths = {1, *widths}
        self.picked = Picked(size, tables)
        self.refused: set[int] = set()  # used in a way that hands not all out
        self.mixes_losses = False  # whether a mean had no rows of each sample
        self._labelled: dict[bool, set[int]] = {True: set(), False: set()}
        self.losses: list[Tensor] = []  # ``[n]`` for each mean that was replaced
        self._numbers = {id(p): i for i, p in parameters.items()}
        self._flipped: dict[int, Tensor] = {}
        self._aliases: list[Tensor] = []
        self._observe = observe
        self.scale = scale
        self._uses: dict[int, int] = defaultdict(int)
        self._found: dict[int, list[SampleGradients]] = defaultdict(list)
        # Makes outputs require a gradient although every parameter is frozen.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def number(self, tensor: Any) -> int | None:
        """Return the number of a parameter, None for any other tensor."""
        return self._numbers.get(id(tensor)) if tensor is not None else None

    def alias(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Note that a tensor has the gradients of a parameter; return it."""
        self._numbers[id(tensor)] = self._numbers[id(parameter)]
        self._aliases.append(tensor)  # held, so that no other gets the number
        return tensor

    def note_labels(self, are_there: Sequence[bool]) -> None:
        """Note which samples of the batch have a label in a mean."""
        for sample, is_there in enumerate(are_there):
            self._labelled[is_there].add(sample)

    @property
    def unlabelled(self) -> set[int]:
        """Samples that have a mean over no label, and none over one."""
        return self._labelled[False] - self._labelled[True]

    def flip(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Note that a tensor is a parameter transposed; return it."""
        self._flipped[id(tensor)] = parameter
        self._aliases.append(tensor)
        return tensor

    def flipped(self, tensor: Any) -> Tensor | None:
        """Return the parameter that a tensor is the transpose of."""
        return self._flipped.get(id(tensor))

    def use(self, number: int | None) -> None:
        """Note that a parameter is used."""
        if number is not None:
            self._uses[number] += 1

    def hand_out(self, number: int, gradients: SampleGradients) -> None:
        """Take the gradients of one use; pass them on once there are all of them."""
        found = self._found[number]
        found.append(gradients)
        if len(found) == self._uses[number]:
            self._pass_on(number)

    def finish(self) -> None:
        """Pass on what is left: some uses had no gradient."""
        for number in list(self._found):
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        gradients = combine(self._found.pop(number))
        if gradients is None:
            self.refused.add(number)
        else:
            self._observe(number, gradients)

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Return a tensor with a leading batch as ``[n, t, features]``."""
        return tensor.reshape(self.size, -1, tensor.shape[-1])

    def dense(self, values: Tensor) -> Dense:
        """Return gradients of shape ``[n, numel]``, in float32 or better, unscaled."""
        values = values if values.dtype == torch.float64 else values.float()
        return Dense(values / self.scale if self.scale != 1.0 else values)

    def token_sums(self, tensor: Tensor) -> Dense:
        """Return gradients that are sums over the tokens of a sample.

        Args:
            tensor: With a leading batch. Shape ``[*, numel]``.
        """
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return self.dense(self.by_sample(tensor).sum(1, dtype=dtype))

    def outer(self, left: Tensor, right: Tensor) -> Outer:
        """Return gradients as products of factors, unscaled."""
        return Outer(left.detach(), right.detach(), 1 / self.scale)

    def rows(self, ids: Tensor, grads: Tensor) -> Rows:
        """Return gradients of looked-up rows, in float32 or better, unscaled."""
        grads = grads if grads.dtype == torch.float64 else grads.float()
        grads = grads / self.scale if self.scale != 1.0 else grads
        return Rows.of_tokens(ids.reshape(self.size, -1), grads)

    def splits(self, tensor: Tensor) -> bool:
        """Return whether a tensor's leading dimension is made of samples, in order.

        Rows that were picked out of a batch, as for an expert, are not.
        """
        if self.size == 1:
            return tensor.ndim > 0
        if tensor in self.picked:
            return False
        each, rest = divmod(tensor.shape[0] if tensor.ndim else 0, self.size)
        is_flat = tensor.ndim < 3
        return bool(each) and not rest and (not is_flat or each in self.widths)

    def is_known(self, tensor: Any) -> bool:
        """Return whether a tensor is a parameter, or stands for one."""
        return self._number_of(tensor) is not None

    def refuse(self, tensors: Iterable[Tensor]) -> None:
        """Note the parameters among the arguments of a call that was left alone."""
        numbers = map(self._number_of, tensors)
        self.refused.update(number for number in numbers if number is not None)

    def _number_of(self, tensor: Any) -> int | None:
        return self.number(self._flipped.get(id(tensor), tensor))


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Return what a function of autograd makes of its arguments."""
    return function.apply(*args)
