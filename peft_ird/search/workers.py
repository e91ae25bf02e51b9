"""Trials one after another, or in processes of their own."""

import gc
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

import torch

from peft_ird.search.trial import Trial

__all__ = ["Workers", "end_with_parent"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LONG = 5.0  # seconds of a trial, beside which collecting garbage takes no time
_ENVIRONMENT = threading.Lock()  # of this process, which new ones inherit


class Workers:
    """Runs trials, several at a time.

    Every trial has a process of its own, which ends with it: what it leaves in memory
    is gone, and if it is killed, that trial alone has failed. All end if the process
    that started them is killed.

    Args:
        number: How many trials at a time; None for one for each device.
        devices: A device for each of them, as ``"cuda:1"``; a process sees no other
            GPU. By default models stay where they are made.

    Raises:
        TypeError: If ``devices`` is a text.
        ValueError: If there are fewer devices than workers, no worker, or a device that
            does not exist.
    """

    def __init__(
        self,
        number: int | None = None,
        devices: Sequence[str | torch.device] | None = None,
    ) -> None:
        if isinstance(devices, str):
            raise TypeError(f"`devices` must be a list, as [{devices!r}].")
        if number is None:
            number = 1 if devices is None else len(devices)
        if number < 1 or (devices is not None and len(devices) < number):
            raise ValueError(
                f"`workers` must be at least 1, and have a device each; got {number} "
                f"workers and devices={devices}."
            )
        names = [_checked(device) for device in devices or ()]
        self._slots = [None] * number if devices is None else names[:number]
        self._has_processes = number > 1 or devices is not None

    def check(self, **arguments: object) -> None:
        """Check that what other processes need can be sent there.

        Args:
            **arguments: What they need, by name.

        Raises:
            ValueError: If it cannot be pickled, or is of a script that has no file.
        """
        main = sys.modules["__main__"]
        for name, argument in arguments.items() if self._has_processes else ():
            try:
                sent = pickle.dumps(argument)
            except Exception as error:
                raise ValueError(
                    f"`{name}` cannot be sent to another process: {error}. Define it "
                    "at the top of a module, or as functools.partial of such a "
                    "function; or leave `workers` and `devices` out."
                ) from error
            if b"__main__" in sent and not hasattr(main, "__file__"):
                raise ValueError(
                    f"`{name}` is defined in a notebook or on the command line, where "
                    "other processes do not find it. Put it into a module and import "
                    "it; or leave `workers` and `devices` out."
                )

    def run(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Run trials.

        Args:
            trials: The trials.

        Yields:
            Each of them when it has ended.
        """
        if self._has_processes:
            yield from self._in_processes(trials)
            return
        for trial in trials:
            start = time.perf_counter()
            trial.run()
            if time.perf_counter() - start > _LONG:
                gc.collect()  # a Trainer and its model are in reference cycles
            yield trial

    def _in_processes(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        at_once = max(1, min(len(self._slots), len(trials)))
        threads = max(1, torch.get_num_threads() // at_once)
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
            futures: dict[Future[None], Trial] = {
                pool.submit(run, t): t for t in trials
            }
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _run_alone(trial: Trial, device: str | None, threads: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _begin, (threads,)) as process:
        try:
            with _only_visible(device):
                future = process.submit(trial.run)  # starts the process
            future.result()
        except BrokenProcessPool as error:
            hint = (
                "Its last words are on the standard error stream. A script that asks "
                'for workers needs `if __name__ == "__main__":`.'
            )
            trial.fail(BrokenProcessPool(f"{error} {hint}"))


def _begin(threads: int) -> None:
    """Prepare a new process."""
    end_with_parent()
    torch.set_num_threads(threads)


def end_with_parent() -> None:
    """Let this process end when the one that started it is killed."""

    def wait_for_it() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()


@contextmanager
def _only_visible(device: str | None) -> Iterator[None]:
    """Let a process that starts now see one GPU, or none; not even imports see more.

    Args:
        device: The device of the process; None for all.
    """
    kind, _, index = (device or "").partition(":")
    if kind not in {"cpu", "cuda"}:
        yield
        return
    with _ENVIRONMENT:
        before = os.environ.get(_VISIBLE)
        names = before.split(",") if before else None
        mine = names[int(index or 0)] if names else index or "0"
        os.environ[_VISIBLE] = mine if kind == "cuda" else ""
        try:
            yield
        finally:
            del os.environ[_VISIBLE]
            if before is not None:
                os.environ[_VISIBLE] = before


def _checked(device: str | torch.device) -> str:
    """Return the name of a device; refuse a GPU that this process does not see."""
    found = torch.device(device)
    there = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= there:
        raise ValueError(
            f"`devices` names '{found}', but this process sees {there} GPUs. Look at "
            f"torch.cuda.device_count() and {_VISIBLE}."
        )
    return str(found)


def _seen_as(device: str | None) -> str | None:
    """Return the name that a device has in its process."""
    return "cuda:0" if device is not None and device.startswith("cuda") else device
