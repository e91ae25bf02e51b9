"""What is read of a layer in place of the module that it wraps."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.ops import add_deltas

__all__ = ["Reading", "asked_for"]

_OWN = {"base_layer", "_parameters", "_buffers", "_modules"}

_FACTS = {
    *(getattr(Tensor, name).__get__ for name in (
        "device", "dtype", "grad", "is_cuda", "is_meta", "ndim", "requires_grad",
        "shape",
    )),
    Tensor.dim, Tensor.is_floating_point, Tensor.numel, Tensor.size,
}  # fmt: skip


class _Asked(threading.local):
    """What each thread asks of modules: the adapter of each sample, by module."""

    def __init__(self) -> None:
        self.names: dict[int, Sequence[str]] = {}


_ASKED = _Asked()


@contextmanager
def asked_for(names: Mapping[nn.Module, Sequence[str]]) -> Iterator[None]:
    """Let this thread read modules as of batches with an adapter for each sample.

    Args:
        names: The adapters, by module.
    """
    before = _ASKED.names
    _ASKED.names = {**before, **{id(module): each for module, each in names.items()}}
    try:
        yield
    finally:
        _ASKED.names = before


class _OfSeveral(Tensor):
    """A parameter that is another one for each sample: what and where may be asked."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        raise ValueError(
            "A weight that another module computes with cannot be another one for each "
            "sample. Run the samples of each adapter in a batch of their own, or leave "
            "the weight's module out of the adapters by `exclude_modules`."
        )


class Reading(nn.Module):
    """The part of a layer that answers for the module inside.

    Parameters are read with the deltas of the active adapters in them: some modules
    read a child's weight and never call it, as multi-head attention does with its
    output projection.
    """

    get_base_layer: Any
    # Of the module's parameters; FSDP puts views in their place.
    _names: tuple[str, ...]

    def _base_parameter(self, name: str) -> Tensor:
        raise NotImplementedError

    def _deltas_in_force(
        self, adapters: Sequence[str] | None = None
    ) -> Mapping[str, list[SparseDelta]]:
        raise NotImplementedError

    def parameter_in_force(self, name: str) -> Tensor:
        """Return a base parameter with the deltas of the active adapters.

        Args:
            name: The parameter.
        """
        weight = self._base_parameter(name)
        names = _ASKED.names.get(id(self))
        asked = [None] if names is None else [[each] for each in {*names}]
        first, *others = [self._deltas_in_force(each).get(name) for each in asked]
        if others and any([first, *others]):
            return weight.detach().as_subclass(_OfSeveral)
        return add_deltas(weight, first) if first else weight

    @property
    def weight(self) -> Any:
        """The base layer's weight with the active deltas."""
        return self._read("weight")

    @property
    def bias(self) -> Any:
        """The base layer's bias with the active deltas."""
        return self._read("bias")

    def _read(self, name: str) -> Any:
        base = self.get_base_layer()
        found = getattr(base, name)
        is_parameter = name in self._names and found is not None
        return self.parameter_in_force(name) if is_parameter else found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN or name.startswith(("__", "_hf_", "_old_forward")):
                raise
            return self._read(name)
