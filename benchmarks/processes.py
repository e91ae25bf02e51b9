"""The same work in several new processes of one group."""

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

__all__ = ["in_processes"]

_PATIENCE = 1800.0  # seconds; a process that was killed says nothing


def in_processes(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a function returns in each of several processes, by rank.

    Args:
        size: Number of processes.
        work: A function of a module; the default group is there when it is called.
        *arguments: Its arguments.

    Raises:
        RuntimeError: If a process fails, after what it prints.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = [
        context.Process(
            target=_join, args=(rank, size, port, queue, work, arguments), daemon=True
        )
        for rank in range(size)
    ]
    for process in started:
        process.start()
    found = dict(queue.get(timeout=_PATIENCE) for _ in started)
    for process in started:
        process.join()
    if failed := [rank for rank, result in found.items() if result is None]:
        raise RuntimeError(f"{work.__name__} failed in processes {failed}.")
    return [found[rank][0] for rank in range(size)]


def _join(
    rank: int,
    size: int,
    port: int,
    queue: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    result = None
    try:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
        result = (work(*arguments),)
    finally:
        queue.put((rank, result))
    dist.barrier()
    dist.destroy_process_group()
