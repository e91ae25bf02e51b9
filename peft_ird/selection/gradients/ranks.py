"""The processes that share a selection, or the only one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """What the processes of the default group do together; alone, nothing.

    Every process must go through the same calls in the same order.
    """

    def __init__(self) -> None:
        is_on = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if is_on else 1
        self.rank = dist.get_rank() if is_on else 0

    def share(self, work: Sequence[T], costs: Sequence[float]) -> list[T]:
        """Return this process's share, in order; every piece goes to one process.

        Args:
            work: The same pieces of work on every process.
            costs: What each piece costs; large ones are dealt out first.
        """
        if self.size == 1:
            return list(work)
        loads = [0.0] * self.size
        mine = []
        for i in sorted(range(len(work)), key=lambda i: (-costs[i], i)):
            to = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[to] += costs[i]
            if to == self.rank:
                mine.append(i)
        return [work[i] for i in sorted(mine)]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size == 1:
            return
        for tensor in tensors:
            here = tensor.to(self._device(tensor))
            dist.all_reduce(here)
            if here is not tensor:
                tensor.copy_(here)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor with that of the first process."""
        if self.size == 1:
            return
        for tensor in tensors:
            here = tensor.to(self._device(tensor))
            dist.broadcast(here, 0)
            tensor.copy_(here)

    def gather(self, thing: T) -> list[T]:
        """Return what each process has, in the order of their ranks."""
        if self.size == 1:
            return [thing]
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, thing)
        return everything

    def agree(self, make: Callable[[], dict[str, Any]]) -> None:
        """Check that all processes were asked for the same.

        Args:
            make: Returns what must be equal, by name; not called in an only process.

        Raises:
            ValueError: If they differ; the first fact that does is named.
        """
        if self.size == 1:
            return
        facts = make()
        for rank, others in enumerate(self.gather(facts)):
            for name, value in facts.items():
                if others[name] != value:
                    raise ValueError(
                        f"All processes must select with the same {name}, but rank "
                        f"{self.rank} has {value!r} and rank {rank} has "
                        f"{others[name]!r}. Give every process the same model, data "
                        "and configuration."
                    )

    def raise_together(self, error: Exception | None) -> None:
        """Raise on all processes if one of them met an error.

        Args:
            error: What this process met.

        Raises:
            Exception: This process's own error.
            ValueError: With the message of another process.
        """
        messages = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"Rank {rank}: {message}")

    def _device(self, tensor: Tensor) -> torch.device:
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
            return torch.device("cuda", torch.cuda.current_device())
        return tensor.device
