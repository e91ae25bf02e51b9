"""Whoever gives the Fisher information, or only takes gradients, of the same samples.

Contestants are context managers: what happens before the pass is done on entering, and
the function that they give runs the pass. `selection_speed.py` times them. Opacus and
BackPACK are needed for nothing else:

pip install --no-deps -c constraints.txt opacus backpack-for-pytorch einops unfoldNd
pip install -c constraints.txt opt_einsum scipy
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_ird.selection.calibration import Calibration
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed
from peft_ird.selection.pool import Pool

Batch = dict[str, Tensor]
Sample = dict[str, Any]
Run = Callable[[], Iterable[Tensor]]
# Larger batches were not faster: 2 GiB is 4 to 50 samples of the shapes measured.
OPACUS_BYTES = 2 << 30


@dataclass(frozen=True)
class Work:
    """What contestants share. All others take the batches that the engine makes.

    Args:
        model: In eval mode; only the candidates require gradients.
        pool: The candidates.
        samples: Lists of tokens, and labels.
        padded_to: Tokens that the one-sample loop pads to; 0 for no padding.
        groups: Positions of the samples of each batch.
    """

    model: nn.Module
    pool: Pool
    samples: list[Sample]
    padded_to: int = 0
    groups: tuple[tuple[int, ...], ...] = ()

    def batches(self) -> Iterator[Batch]:
        """Yield the batches, padded to their longest samples."""
        for group in self.groups:
            yield collate([self.samples[i] for i in group])


def collate(samples: Sequence[Sample], padded_to: int = 0) -> Batch:
    """Pad samples with zeros to the longest of them, or further."""
    size = max(padded_to, *(len(each["input_ids"]) for each in samples))
    batch = {
        name: torch.tensor(
            [each[name] + [0] * (size - len(each[name])) for each in samples]
        )
        for name in ("input_ids", "attention_mask")
    }
    return {**batch, "labels": torch.tensor([each["labels"] for each in samples])}


@contextmanager
def engine(work: Work) -> Iterator[Run]:
    """Ours: read the samples and check two of them, then run a batched pass."""
    with borrowed(work.model):
        estimator = _prepared(work)
        positions = tuple(range(len(work.samples)))
        yield lambda: (part for _, part in estimator.fisher(positions))


@contextmanager
def limited(work: Work) -> Iterator[Run]:
    """Ours, within the bytes of one float32 copy of the candidates."""
    with borrowed(work.model):
        estimator = _prepared(work, memory_limit=4 * len(work.pool))
        positions = tuple(range(len(work.samples)))
        yield lambda: (part for _, part in estimator.fisher(positions))


def with_batches(work: Work) -> tuple[tuple[int, ...], ...]:
    """Return the batches that the engine makes of the samples."""
    with borrowed(work.model):
        found = _prepared(work).batches(tuple(range(len(work.samples))))
    return tuple(map(tuple, found))


def _prepared(work: Work, memory_limit: int | None = None) -> FisherEstimator:
    estimator = FisherEstimator(
        work.model,
        work.pool,
        Calibration(work.samples),
        memory_limit=memory_limit,
    )
    estimator.batches(tuple(range(len(work.samples))))
    return estimator


@contextmanager
def plain(work: Work) -> Iterator[Run]:
    """Go forward and backward over the batches and drop the gradients: no result."""

    def run() -> Iterable[Tensor]:
        for batch in work.batches():
            work.model(**batch).loss.backward()
            work.model.zero_grad(set_to_none=True)
        return ()

    yield run


@contextmanager
def loop(work: Work) -> Iterator[Run]:
    """Take one backward pass a sample and add the squares of the gradients."""

    def run() -> Iterable[Tensor]:
        sums = [torch.zeros_like(p) for p in work.pool.parameters]
        for sample in work.samples:
            work.model(**collate([sample], work.padded_to)).loss.backward()
            for total, parameter in zip(sums, work.pool.parameters, strict=True):
                total.addcmul_(parameter.grad, parameter.grad)
            work.model.zero_grad(set_to_none=True)
        return [total.div_(len(work.samples)) for total in sums]

    yield run


def unpadded(work: Work) -> AbstractContextManager[Run]:
    """Do the same without padding."""
    return loop(replace(work, padded_to=0))


@contextmanager
def opacus(work: Work) -> Iterator[Run]:
    """Let ``GradSampleModule`` keep each sample's gradients until backward ends."""
    samplers = importlib.import_module("opacus.grad_sample")
    own, trained = _copy_of(work)
    own.train()  # its hooks rest in eval mode
    wrapped = samplers.GradSampleModule(own, loss_reduction="mean", strict=False)
    limit = max(1, OPACUS_BYTES // (4 * len(work.pool)))

    def run() -> Iterable[Tensor]:
        sums = {parameter: torch.zeros_like(parameter) for parameter in trained}
        for batch in _split(work.batches(), limit):
            shape = batch["input_ids"].shape  # ids of shape (1, T) would be mis-sized
            ids = torch.arange(shape[1]).expand(shape)
            _backward(wrapped(**batch, position_ids=ids).loss)
            for parameter, total in sums.items():
                _add_squares(total, parameter.grad_sample)
                parameter.grad_sample = parameter.grad = None
        return [total.div_(len(work.samples)) for total in sums.values()]

    yield run


@contextmanager
def backpack(work: Work) -> Iterator[Run]:
    """Let ``BatchGrad`` make single-sample gradients, one module's at a time.

    On sequences ``SumGradSquared`` is two to six times slower.
    """
    library = importlib.import_module("backpack")
    extension = importlib.import_module("backpack.extensions").BatchGrad
    own, trained = _copy_of(work)
    for module in own.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            library.extend(module)

    def take(sums: dict[Any, Tensor], module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            _add_squares(sums[parameter], parameter.grad_batch)
            del parameter.grad_batch

    def run() -> Iterable[Tensor]:
        sums = {parameter: torch.zeros_like(parameter) for parameter in trained}
        for batch in work.batches():
            with library.backpack(extension(), extension_hook=partial(take, sums)):
                _backward(own(**batch).loss * len(batch["labels"]))
            own.zero_grad(set_to_none=True)
        return [total.div_(len(work.samples)) for total in sums.values()]

    yield run


CONTESTANTS: dict[str, Callable[[Work], AbstractContextManager[Run]]] = {
    "plain": plain,
    "engine": engine,
    "limited": limited,
    "loop": loop,
    "unpadded": unpadded,
    "opacus": opacus,
    "backpack": backpack,
}


@dataclass(frozen=True)
class Peer:
    """Another library: its title and package, what it can do, and how it is used."""

    title: str
    package: str
    scopes: tuple[str, ...]
    note: str


PEERS = {
    "opacus": Peer(
        "Opacus",
        "opacus",
        ("all", "linear"),
        "GradSampleModule in training mode without dropout, position ids expanded, "
        f"batches of at most {OPACUS_BYTES >> 30} GiB of gradients",
    ),
    "backpack": Peer(
        "BackPACK",
        "backpack-for-pytorch",
        ("linear",),
        "BatchGrad, squared in its extension hook; linear layers only: it has no "
        "LayerNorm, and its Embedding refuses a padding index",
    ),
}


def _copy_of(work: Work) -> tuple[nn.Module, list[Any]]:
    """Return a copy of the model without dropout, and its candidates."""
    own = copy.deepcopy(work.model)
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return own, [own.get_parameter(".".join(name)) for name in work.pool.names]


def _split(batches: Iterable[Batch], limit: int) -> Iterator[Batch]:
    for batch in batches:
        pieces = {name: field.split(limit) for name, field in batch.items()}
        for values in zip(*pieces.values(), strict=True):
            yield dict(zip(pieces, values, strict=True))


def _backward(loss: Tensor) -> None:
    with warnings.catch_warnings():  # the first layers' inputs need no gradient
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        loss.backward()


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    for gradient in gradients:
        total.addcmul_(gradient, gradient)
