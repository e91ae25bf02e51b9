"""Trials one after another, or in processes of their own."""

import multiprocessing
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from queue import SimpleQueue

import torch

from peft_ird.search.trial import Trial

__all__ = ["Workers"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Workers:
    """Runs trials, several at a time.

    Every trial has a process of its own, which ends with it: what it leaves in memory
    is gone, and if it is killed, that trial alone has failed.

    Args:
        number: How many trials at a time; None for one for each device.
        devices: A device for each of them, as ``"cuda:1"``; a process sees no other
            GPU. By default models stay where they are made.

    Raises:
        ValueError: If there are fewer devices than workers, no worker, or a device that
            does not exist.
    """

    def __init__(
        self, number: int | None = None, devices: Sequence[str] | None = None
    ) -> None:
        if number is None:
            number = 1 if devices is None else len(devices)
        if number < 1 or (devices is not None and len(devices) < number):
            raise ValueError(
                f"`workers` must be at least 1, and have a device each; got {number} "
                f"workers and devices={devices}."
            )
        for device in devices or ():
            _check_device(device)
        self._slots = [None] * number if devices is None else list(devices)[:number]
        self._has_processes = number > 1 or devices is not None

    def check(self, **arguments: object) -> None:
        """Check that what other processes need can be sent there.

        Args:
            **arguments: What they need, by name.

        Raises:
            ValueError: If it cannot be pickled.
        """
        for name, argument in arguments.items() if self._has_processes else ():
            try:
                pickle.dumps(argument)
            except Exception as error:
                raise ValueError(
                    f"`{name}` cannot be sent to another process: {error}. Define it "
                    "at the top of a module, or as functools.partial of such a "
                    "function; or leave `workers` and `devices` out."
                ) from error

    def run(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Run trials.

        Args:
            trials: The trials.

        Yields:
            None, whenever one has ended.
        """
        if self._has_processes:
            yield from self._in_processes(trials)
            return
        for trial in trials:
            trial.run()
            yield

    def _in_processes(self, trials: Sequence[Trial]) -> Iterator[None]:
        threads = max(1, torch.get_num_threads() // len(self._slots))
        free: SimpleQueue[str | None] = SimpleQueue()
        for slot in self._slots:
            free.put(slot)

        def run(trial: Trial) -> None:
            slot = free.get()
            try:
                _run_alone(replace(trial, device=_seen_as(slot)), slot, threads)
            finally:
                free.put(slot)

        with ThreadPoolExecutor(len(self._slots)) as pool:
            futures: list[Future[None]] = [pool.submit(run, t) for t in trials]
            try:
                for future in as_completed(futures):
                    future.result()
                    yield
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _run_alone(trial: Trial, device: str | None, threads: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _settle_in, (device, threads)) as process:
        try:
            process.submit(trial.run).result()
        except BrokenProcessPool as error:
            trial.fail(error)


def _settle_in(device: str | None, threads: int) -> None:
    """Take a share of the threads, and the one GPU, before anything starts it."""
    torch.set_num_threads(threads)
    kind, _, index = (device or "").partition(":")
    if kind == "cuda":
        visible = os.environ.get(_VISIBLE)
        names = visible.split(",") if visible else None
        os.environ[_VISIBLE] = names[int(index or 0)] if names else index or "0"


def _check_device(device: str) -> None:
    """Refuse a GPU that this process does not see."""
    found = torch.device(device)
    there = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= there:
        raise ValueError(
            f"`devices` names {device!r}, but this process sees {there} GPUs. Look at "
            f"torch.cuda.device_count() and {_VISIBLE}."
        )


def _seen_as(device: str | None) -> str | None:
    """Return the name that a device has in its process."""
    return "cuda:0" if device is not None and device.startswith("cuda") else device
