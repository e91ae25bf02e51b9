"""The Trainer of a cell: the stock one, whose evaluations see every sample."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

__all__ = ["CellTrainer"]


class CellTrainer(Trainer):  # type: ignore[misc]
    """Trains as the stock Trainer does.

    Evaluations leave no sample out, whatever training does with those that fill no
    batch: weights and cells are chosen by them.
    """

    def scores(self, rows: Any) -> dict[str, float]:
        """Return the metrics on some rows; callbacks hear nothing of it.

        Args:
            rows: A dataset.
        """
        found: dict[str, float] = self.predict(rows, metric_key_prefix="eval").metrics
        return found

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer."""
        with self._whole():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer."""
        with self._whole():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        given = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = given
