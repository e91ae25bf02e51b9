"""The processes that share a selection, or the only one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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

    def deal(self, shares: Tensor) -> Tensor:
        """Give each process its share.

        Args:
            shares: What this process has for each. Shape ``[size, k]``.

        Returns:
            What each has for this process, in the order of their ranks. The same shape.
        """
        here = shares.to(self._device(shares)).contiguous()
        dealt = torch.empty_like(here)
        dist.all_to_all_single(dealt, here)
        return dealt.to(shares.device)

    def collect(self, share: Tensor) -> Tensor:
        """Return the shares of all processes, in the order of their ranks.

        Args:
            share: This process's. Shape ``[k]``.

        Returns:
            Shape ``[size, k]``.
        """
        here = share.to(self._device(share))
        found = here.new_empty(self.size, len(here))
        dist.all_gather(list(found), here)
        return found.to(share.device)

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
        with self.raising_together():
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
        what = None if error is None else f"{type(error).__name__}: {error}"
        messages = self.gather(what)
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"Rank {rank}: {message}")

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """Raise an error on all processes, so that none waits for one that failed."""
        error: Exception | None = None
        try:
            yield
        except Exception as problem:
            error = problem
        self.raise_together(error)

    def _device(self, tensor: Tensor) -> torch.device:
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
            return torch.device("cuda", torch.cuda.current_device())
        return tensor.device
