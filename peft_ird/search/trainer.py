"""The Trainer of a cell: the stock one, whose evaluations see every sample."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer

__all__ = ["CellTrainer"]

logger = logging.getLogger(__name__)


class CellTrainer(Trainer):  # type: ignore[misc]
    """Trains as the stock Trainer does.

    Evaluations leave no sample out, whatever training does with those that fill no
    batch: weights and cells are chosen by them. The order of an epoch depends on the
    seed and its number alone, so that training can pause inside it.
    """

    compute_metrics: Any

    def scores(self, rows: Any) -> dict[str, float]:
        """Return the metrics on some rows; callbacks hear nothing of it.

        Args:
            rows: A dataset.
        """
        found: dict[str, float] = self.predict(rows, metric_key_prefix="eval").metrics
        return found

    def tried_scores(self, rows: Any) -> dict[str, float] | None:
        """Return the metrics on a few rows; None if they cannot be computed on these.

        Args:
            rows: A dataset.
        """
        given = self.compute_metrics
        errors: list[Exception] = []

        def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                return given(*args, **kwargs)
            except Exception as error:
                errors.append(error)
                return {}

        self.compute_metrics = given and attempt
        try:
            found = self.scores(rows)
        finally:
            self.compute_metrics = given
        if not errors:
            return found
        logger.warning(
            "`compute_metrics` failed on the first batch, so that whether it returns "
            "the metric shows after training: %r", errors[0],
        )  # fmt: skip
        return None

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer."""
        with self._whole():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer."""
        with self._whole():
            return super().get_test_dataloader(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        is_seeded = (  # by accelerate, in the place of PyTorch's
            isinstance(sampler, RandomSampler)
            and self.args.accelerator_config.use_seedable_sampler
        )
        if is_seeded or not hasattr(sampler, "generator"):
            return sampler
        seed = self.args.data_seed
        return _Replayed(sampler, self.args.seed if seed is None else seed)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        given = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = given


class _Replayed(Sampler[int]):
    """Draws the order of an epoch by its number, not by what was drawn before.

    Args:
        sampler: What draws it, by its ``generator``.
        seed: The seed of all epochs.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        sampler.generator = torch.Generator()
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; the Trainer does.

        Args:
            epoch: Its number, from 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
