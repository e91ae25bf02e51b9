"""The processes that share a selection, or the only one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def rounds(self, work: Sequence[T]) -> Iterator[tuple[Sequence[T], T | None]]:
        """Deal out work, a piece to each process in every round.

        Args:
            work: The same pieces of work on every process.

        Yields:
            The pieces of a round, in the order of the ranks, and this process's; None
            if there is none for it in the last round.
        """
        for first in range(0, len(work), self.size):
            pieces = work[first : first + self.size]
            yield pieces, pieces[self.rank] if self.rank < len(pieces) else None

    def sums(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Replace each tensor by its sum over the processes, and return them."""
        listed = list(tensors)
        for tensor in listed if self.size > 1 else ():
            here = tensor.to(self._device(tensor))
            dist.all_reduce(here)
            if here is not tensor:
                tensor.copy_(here)
        return listed

    def deal(self, tensor: Tensor) -> Sequence[Tensor]:
        """Give each process its share of a tensor.

        Args:
            tensor: 1-D, of a multiple of ``size`` entries, of as many on every process.

        Returns:
            This process's share of what each has, in the order of their ranks.
        """
        here = tensor.to(self._device(tensor))
        dealt = torch.empty_like(here)
        dist.all_to_all_single(dealt, here)
        return dealt.to(tensor.device).chunk(self.size)

    def collect_(self, tensor: Tensor, share: Tensor) -> None:
        """Overwrite a tensor with the shares of all processes.

        Args:
            tensor: 1-D, of ``size`` times as many entries as a share.
            share: This process's.
        """
        here = tensor.to(self._device(tensor))
        dist.all_gather(list(here.chunk(self.size)), share.to(here.device))
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
