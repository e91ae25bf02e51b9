"""Some samples through the model, together and alone: what is exact in batches."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peft_ird.selection.gradients.batching import Sample
from peft_ird.selection.gradients.dense import Dense
from peft_ird.selection.gradients.forms import SampleGradients
from peft_ird.selection.gradients.kept import holds_more
from peft_ird.selection.gradients.pairs import telling_pairs
from peft_ird.selection.gradients.together import Together, size_of
from peft_ird.selection.gradients.where import Where

__all__ = ["Outcome", "Trial"]

logger = logging.getLogger(__name__)

# Relative difference up to which batch and single sample agree: of squared norms, of
# a row of the gradient, whose own error a norm would hardly show, and of losses, which
# may be computed in the type of the parameters. What a squared norm may be off on top
# is the noise, a share of the largest one of any parameter.
_DOUBLE = {"norm": 1e-6, "row": 1e-6, "loss": 1e-6, "noise": 1e-16}
_SINGLE = {"norm": 2e-4, "row": 5e-5, "loss": 1e-5, "noise": 1e-13}
_ROUNDED = {"norm": 1e-3, "row": 1e-2, "loss": 1e-3, "noise": 1e-8}
_HALF = {"norm": 0.2, "row": 0.5, "loss": 0.05, "noise": 1e-8}
_TINY = 1e-300
_MOST_SILENT = 64  # samples without a gradient that others are tried instead of
_LOOKED_AT = 2048  # samples at a time that pairs are chosen from


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Args:
        padded: Whether padding is harmless: samples of different lengths may share a
            batch, and padding that came with them may be cut off.
        has_losses: Whether the losses of samples are known from a batch.
        alone: Parameters whose gradients in a batch are not those alone, or that the
            samples tried do not use.
        is_single: Whether no two samples that may share a batch were found to try; then
            none may.
        token_bytes: Bytes of the gradients of one token.
        sample_bytes: Bytes of the gradients of a sample that do not grow with tokens.
        activation_bytes: Bytes of what one token leaves for the backward pass.
    """

    padded: bool
    has_losses: bool
    alone: frozenset[int]
    is_single: bool = False
    token_bytes: float = 0.0
    sample_bytes: float = 0.0
    activation_bytes: float = 0.0

    @staticmethod
    def agreed(outcomes: Sequence["Outcome"]) -> "Outcome":
        """Return what holds for several processes, so that all make the same batches.

        Args:
            outcomes: What each of them found.
        """
        return Outcome(
            all(each.padded for each in outcomes),
            all(each.has_losses for each in outcomes),
            frozenset().union(*(each.alone for each in outcomes)),
            any(each.is_single for each in outcomes),
            max(each.token_bytes for each in outcomes),
            max(each.sample_bytes for each in outcomes),
            max(each.activation_bytes for each in outcomes),
        )


@dataclass(frozen=True)
class _Pair:
    """Two samples of one kind, or three, or one, and what each of them gives alone.

    Args:
        samples: The samples.
        losses: Their losses, ``[n]``, float64.
        norms: Squared norms of their gradients, ``[n, parameters]``, float64; NaN where
            there is no gradient.
        rows: For each parameter with a gradient where its largest row is, and that row
            of each sample, ``[n, columns]``.
    """

    samples: Sequence[Sample]
    losses: Tensor
    norms: Tensor
    rows: Mapping[int, tuple[Where, Tensor]]

    @property
    def silent(self) -> set[int]:
        """Positions of the samples that have no gradient but zeros."""
        is_silent = self.norms.nan_to_num().eq(0).all(1).tolist()
        return {
            s.position for s, each in zip(self.samples, is_silent, strict=True) if each
        }


class Trial:
    """Compares batches with single samples.

    Args:
        together: What takes batches through the model.
        groups: Numbers of all parameters; gradients of a group are formed at once.
        batch_size: Samples in a batch, if it is given.
    """

    def __init__(
        self,
        together: Together,
        groups: Sequence[Sequence[int]],
        batch_size: int | None,
    ) -> None:
        self._together = together
        self._groups = groups
        self._batch_size = batch_size
        self._parts = frozenset(part for group in groups for part in group)
        self._silent: set[int] = set()  # positions of samples without a gradient

    def outcome(self, samples: Sequence[int]) -> Outcome:
        """Try padded batches and, if they are not exact, batches of equal shapes.

        Args:
            samples: Positions in the calibration data.

        Raises:
            ValueError: If a sample that is tried has a loss or gradient that is not
                finite, or labels out of range, or if no sample has a label.
        """
        best: Outcome | None = None
        for padded in (True, False):
            pairs = self._telling_pairs(samples, padded)
            if not pairs:
                continue
            found = Outcome.agreed([self._compare(pair, padded) for pair in pairs])
            unused = torch.cat([pair.norms for pair in pairs]).isnan().all(0)
            found = replace(found, alone=found.alone | _positions(unused))
            if best is None or len(found.alone) < len(best.alone):
                best = found
            if len(best.alone) <= len(self._parts) // 4:
                break
        if best is None:
            raise ValueError(
                f"None of the {len(samples)} calibration samples has a label that "
                "counts: all are the ignored index. Check `labels` and the collate_fn."
            )
        return best

    def _telling_pairs(self, samples: Sequence[int], padded: bool) -> list[_Pair]:
        """Return a pair of each kind, taken alone; gradients of zero tell nothing."""
        unlabelled = self._together.singles.unlabelled
        while True:
            labelled = [s for s in samples if s not in unlabelled]
            telling = [s for s in labelled if s not in self._silent]
            is_last = not telling or len(self._silent) >= _MOST_SILENT
            groups = self._groups_of(labelled if is_last else telling, padded)
            pairs = [self._alone(group) for group in groups]
            silent = {s for pair in pairs for s in pair.silent}
            self._silent |= silent
            tried = {s.position for group in groups for s in group}
            if unlabelled.isdisjoint(tried) and (is_last or not silent):
                return pairs

    def _groups_of(self, samples: Sequence[int], padded: bool) -> list[list[Sample]]:
        """Return samples that may share a batch, of different lengths if padded.

        Where equal shapes are meant and there are none, it is one sample.
        """
        if self._batch_size == 1:
            looked_at = [] if padded else self._loaded(samples[:1], padded)
            return [looked_at] if looked_at else []
        looked_at = []
        step = max(1, math.ceil(len(samples) / _LOOKED_AT))
        for start in range(step):  # data may be sorted
            looked_at += self._loaded(samples[start::step], padded)
            found = telling_pairs(looked_at, padded, most=self._batch_size or 3)
            # Padding may do without a trial: equal shapes are always possible.
            if found or padded:
                return found
        return [looked_at[:1]] if looked_at else []

    def _loaded(self, samples: Sequence[int], padded: bool) -> list[Sample]:
        return [self._together.singles.sample(s, padded) for s in samples]

    def _compare(self, pair: _Pair, padded: bool) -> Outcome:
        if pair.silent:
            return Outcome(padded, False, self._parts)
        try:
            return self._batched(pair, padded)
        except torch.OutOfMemoryError as problem:
            raise RuntimeError(
                f"{problem} That was a batch of {len(pair.samples)} samples: pass a "
                "`memory_limit`, or Calibration(..., batch_size=1)."
            ) from problem
        except Exception as problem:  # whatever the model cannot do with a batch
            logger.debug("Samples cannot share a batch: %r", problem)
            return Outcome(padded, False, self._parts)

    def _alone(self, pair: Sequence[Sample]) -> _Pair:
        """Take samples one at a time."""
        norms = torch.full((len(pair), len(self._parts)), torch.nan).double()
        losses = torch.zeros(len(pair), dtype=torch.float64)
        rows: dict[int, tuple[Where, Tensor]] = {}
        parameters = self._together.singles.pool.parameters
        for n, sample in enumerate(pair):
            for group in self._groups:
                losses[n], gradients = self._together.singles.gradients(
                    sample.position, group
                )
                for part in list(gradients):
                    dense = Dense(gradients.pop(part)[None])
                    norms[n, part] = dense.squared_norms((0,))[0]
                    if part not in rows:
                        where = _largest_row(dense.values[0], parameters[part].shape)
                        none = dense.values.new_zeros(len(pair), len(where))
                        rows[part] = where, none
                    where, values = rows[part]
                    values[n] = dense.at((0,), where)
                    del dense  # before those of the next
        return _Pair(pair, losses, norms, rows)

    def _batched(self, pair: _Pair, padded: bool) -> Outcome:
        samples, losses = pair.samples, pair.losses
        gradients: dict[int, SampleGradients] = {}
        model = self._together.singles.model
        saved = _SavedBytes([*model.parameters(), *model.buffers()])
        with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            passed = self._together.run(
                samples, sorted(self._parts), gradients.__setitem__
            )
        if not self._are_close(passed.loss, losses.sum()):
            raise ValueError("the loss of a batch is not the sum of its samples'")
        norms = torch.zeros_like(pair.norms)
        errors = torch.zeros(len(self._parts), dtype=torch.float64)
        rows = range(len(samples))
        for part, each in gradients.items():
            norms[:, part] = each.squared_norms(rows)
            if part in pair.rows:
                where, values = pair.rows[part]
                errors[part] = _relative_error(each.at(rows, where), values)
        tokens = size_of(samples)
        by_token, by_sample = _held_bytes(gradients.values())
        has_losses = passed.losses is not None and self._are_close(
            passed.losses, losses
        )
        return Outcome(
            padded,
            has_losses,
            self._differing(norms, pair.norms.nan_to_num(), errors) | passed.misfits,
            len(samples) == 1,
            by_token / tokens,
            by_sample / len(samples),
            saved.total / tokens,
        )

    def _are_close(self, found: Tensor, expected: Tensor) -> bool:
        share = _tolerance("loss", self._together.singles.model.parameters())
        return torch.allclose(found.double().cpu(), expected, rtol=share, atol=1e-6)

    def _differing(
        self, norms: Tensor, expected: Tensor, errors: Tensor
    ) -> frozenset[int]:
        """Return the parameters whose gradients differ, in norms or in a row."""
        parameters = self._together.singles.pool.parameters
        share, noise = (_tolerance(kind, parameters) for kind in ("norm", "noise"))
        noise_of_norm = noise * expected.amax(1, keepdim=True)
        agrees = (norms - expected).abs() <= share * expected + noise_of_norm
        is_loud = (expected > noise_of_norm).any(0)
        is_off = is_loud & (errors > _tolerance("row", parameters))
        return _positions(~agrees.all(0) | is_off)


def _positions(mask: Tensor) -> frozenset[int]:
    return frozenset(mask.nonzero().flatten().tolist())


def _largest_row(gradient: Tensor, shape: torch.Size) -> Where:
    """Return where the row of a gradient with the largest norm is; 1-D ones have one.

    Args:
        gradient: Of a parameter, 1-D.
        shape: The parameter's shape.
    """
    rows = gradient.view(shape[0] if len(shape) > 1 else 1, -1)
    row = int(torch.linalg.vector_norm(rows, dim=1).argmax())
    flat = torch.arange(rows.shape[1], device=gradient.device)
    return Where(flat + row * rows.shape[1], shape)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    error = torch.linalg.vector_norm(found.double() - expected)
    return float(error / torch.linalg.vector_norm(expected.double()).clamp_min(_TINY))


def _tolerance(kind: str, parameters: Iterable[Tensor]) -> float:
    found = (_tolerances(p) for p in parameters if p.is_floating_point())
    return max(each[kind] for each in found)


def _tolerances(parameter: Tensor) -> Mapping[str, float]:
    if parameter.dtype == torch.float64:
        return _DOUBLE
    if parameter.dtype != torch.float32:
        return _HALF
    # TensorFloat32, or bfloat16 on a CPU, in products and convolutions.
    is_rounded = torch.get_float32_matmul_precision() != "highest"
    is_rounded |= parameter.is_cuda and torch.backends.cudnn.allow_tf32
    return _ROUNDED if is_rounded else _SINGLE


def _held_bytes(gradients: Iterable[SampleGradients]) -> tuple[int, int]:
    """Return the bytes that grow with the tokens, and those of dense gradients."""
    by_token: dict[object, int] = {}  # several parameters may share an input
    by_sample = 0
    for each in gradients:
        if isinstance(each, Dense):
            by_sample += sum(t.nbytes for t in each.tensors())
        else:
            by_token.update((_key(t), t.nbytes) for t in each.tensors())
    return sum(by_token.values()), by_sample


def _key(tensor: Tensor) -> object:
    """Return what is equal for tensors that are kept once."""
    if holds_more(tensor):
        return object()
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class _SavedBytes:
    """Counts what a forward pass saves for the backward pass.

    Args:
        known: Tensors that are there anyhow.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.total = 0
        self._seen = {t.data_ptr() for t in known if t.layout == torch.strided}

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return tensor
        if tensor.data_ptr() not in self._seen:
            self._seen.add(tensor.data_ptr())
            self.total += tensor.nbytes
        return tensor.detach()  # an output that its own graph holds is never freed
