"""The calibration data: single samples of whatever the user trains on."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, IterableDataset, default_collate

from peft_ird.selection.defaults import on_device
from peft_ird.selection.randomness import own_randomness

__all__ = ["Calibration"]

Loss = Callable[[nn.Module, Any], Tensor]
_LABELS = ("labels", "label", "label_ids")
_LOOKED_AT = 64  # samples that a fingerprint is taken of


class Calibration:
    """The examples that the Fisher information is estimated on.

    Every sample is collated alone, so that it does not depend on its neighbours; what
    is computed in a batch is padded after that.

    Args:
        data: A ``datasets.Dataset``, a torch dataset, list or iterable of samples; a
            dictionary of columns with one row per sample; or ready batches, in a
            ``DataLoader`` or, without ``collate_fn``, as a list of tokenizer outputs,
            which are cut into samples. What has no length or index is read once.
        collate_fn: Makes a batch of a list of samples, as for a ``DataLoader``. By
            default fields are turned into tensors with a leading dimension of one, and
            ``label`` becomes ``labels``.
        loss: ``loss(model, batch)`` returns the loss of a batch: one for each sample,
            ``[n]``, their sum, or the mean that ``cross_entropy``, ``nll_loss``,
            ``mse_loss``, ``l1_loss``, ``smooth_l1_loss`` or ``binary_cross_entropy``
            (also of logits) takes. Another mean is found out and taken one sample at a
            time, which is slower.
            Default: the ``loss`` of the model's own output.
        batch_size: Samples in a batch while gradients are computed. Default: as many
            as fit the memory, by length. The gradients do not depend on it.

    With the default loss, fields that the model's forward does not take are dropped
    before ``collate_fn`` sees them, as the Hugging Face Trainer does.
    """

    def __init__(
        self,
        data: Any,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        loss: Loss | None = None,
        batch_size: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.data = data
        self.collate_fn = collate_fn
        self.loss = loss
        self.batch_size = batch_size
        self._samples: Sequence[Any] | None = None
        self._is_batched = False
        self._device = torch.get_default_device()  # of tensors that a loss makes

    @classmethod
    def of(cls, data: Any) -> "Calibration":
        """Return ``data`` itself if it is a calibration set already, else one of it."""
        return data if isinstance(data, cls) else cls(data)

    def __len__(self) -> int:
        return len(self._rows())

    def batch(self, position: int, model: nn.Module) -> Any:
        """Return sample ``position`` as a batch of one.

        Args:
            position: Position in the data, from 0.
            model: The model that it is for; fields that it does not take are dropped.
        """
        batch = sample = self._rows()[position]
        if not self._is_batched:
            if self.loss is None and isinstance(sample, Mapping):
                sample = _only_accepted(sample, model)
            batch = (self.collate_fn or _collate)([sample])
        if self.loss is None and isinstance(batch, Mapping):
            batch = _as_tensors(batch)
        return batch

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss that the model, or the loss given, has for a batch.

        Raises:
            ValueError: If the model gives no loss, as without labels.
        """
        with on_device(self._device):
            if self.loss is not None:
                return self.loss(model, batch)
            loss = getattr(run(model, batch), "loss", None)
        if loss is None:
            fields = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                "The model returned no loss for a calibration sample. Give the samples "
                f"labels, or pass Calibration(..., loss=...); got {fields}."
            )
        return loss  # type: ignore[no-any-return]

    def digest(self) -> str:
        """Return a fingerprint of how many samples there are, and of some, in order.

        These are spread over the data. Only numbers, texts, arrays and tensors count;
        other objects need not be the same in another process.
        """
        rows = self._rows()
        content = hashlib.sha256(f"{len(rows)}".encode())
        for position in range(0, len(rows), max(1, len(rows) // _LOOKED_AT)):
            with own_randomness(position):
                row = rows[position]
            for leaf in tree_leaves(row):
                value = leaf.tolist() if hasattr(leaf, "tolist") else leaf
                is_plain = isinstance(value, list | int | float | str)
                content.update(repr(value if is_plain else type(value)).encode())
        return content.hexdigest()

    def _rows(self) -> Sequence[Any]:
        if self._samples is None:
            with own_randomness(0):  # a loader may shuffle
                self._samples = self._read()
        return self._samples

    def _read(self) -> Sequence[Any]:
        data = self.data
        if isinstance(data, Mapping):
            return _by_row(data)
        self._is_batched = isinstance(data, DataLoader)
        if self._is_batched or not _is_sequence(data):
            data = list(data)
        if len(data) and not self.collate_fn and _has_batch_dimension(data[0]):
            self._is_batched = True
        if self._is_batched:
            return [row for batch in data for row in _unbatch(batch)]
        return data  # type: ignore[no-any-return]


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: a dictionary, a tuple or one tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _only_accepted(sample: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    accepted = set(inspect.signature(model.forward).parameters) | set(_LABELS)
    known = {name: value for name, value in sample.items() if name in accepted}
    return known if set(known) - set(_LABELS) else dict(sample)


def _collate(samples: list[Any]) -> Any:
    (sample,) = samples
    if not isinstance(sample, Mapping):
        return default_collate(samples)
    fields = _as_tensors(sample)
    batch = {k: v[None] if isinstance(v, Tensor) else [v] for k, v in fields.items()}
    for name in ("label", "label_ids"):
        if name in batch:
            batch["labels"] = batch.pop(name)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        batch["labels"] = labels.long()  # as transformers' collator has them
    return batch


def _as_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turn numbers and lists of them into tensors; leave out text and what is None."""
    found = {}
    for name, value in batch.items():
        inner = _innermost(value)
        if value is None or isinstance(inner, str):
            continue
        is_list_of_tensors = isinstance(inner, Tensor) and inner is not value
        is_kept = isinstance(inner, Mapping) or (is_list_of_tensors and inner.ndim > 0)
        found[name] = value if is_kept else torch.as_tensor(value)
    return found


def _innermost(value: Any) -> Any:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def _is_sequence(data: Any) -> bool:
    is_stream = isinstance(data, IterableDataset)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not is_stream


def _by_row(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a dictionary of columns, ragged or not, into samples."""
    if any(hasattr(column, "column_names") for column in columns.values()):
        raise ValueError(
            f"`calibration` has several splits, {', '.join(columns)}; give one of them."
        )
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The columns of `calibration` must have one row per sample, got {sizes}."
        )
    size = next(iter(sizes.values()), 0)
    return [{name: column[i] for name, column in columns.items()} for i in range(size)]


def _has_batch_dimension(row: Any) -> bool:
    """Return whether a row is a batch: its ids have a dimension more than a sample's.

    Ids of a sample have two if they are of several choices; its label is a number then.
    """
    if not isinstance(row, Mapping):
        return False
    ids = row.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        return False
    labels = [row[name] for name in _LABELS if row.get(name) is not None]
    has_number = any(
        not isinstance(v, list | tuple) and getattr(v, "ndim", 0) == 0 for v in labels
    )
    return len(ids) == 1 or not has_number


def _unbatch(batch: Any) -> list[Any]:
    """Cut a batch into batches of one; what has no row per sample stays whole."""
    if isinstance(batch, Mapping):
        batch = _as_tensors(batch)
    named = batch if isinstance(batch, dict) else {}
    leaves = [v for v in named.values() or tree_leaves(batch) if isinstance(v, Tensor)]
    size = named.get("input_ids", leaves[0]).shape[0]

    def pick(i: int) -> Any:
        def row(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: row(each) for name, each in value.items()}
            has_rows = isinstance(value, list) or getattr(value, "ndim", 0) > 0
            return value[i : i + 1] if has_rows and len(value) == size else value

        if named:
            return {name: row(value) for name, value in named.items()}
        return tree_map_only(Tensor, row, batch)

    return [pick(i) for i in range(size)]
