r"""Diagonal Fisher information of single samples.

The gradient of sample n is that of its own loss, :math:`g_n = \partial \ell_n /
\partial \theta`, and :math:`F_X[j] = \frac{1}{|X|} \sum_{n \in X} g_n[j]^2` (Sung et
al., 2021, arXiv:2111.09839). One sample goes through the model at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_ird.selection.calibration import Calibration
from peft_ird.selection.pool import Pool
from peft_ird.selection.randomness import own_randomness
from peft_ird.selection.sampling import check_labels, with_sampled_labels

__all__ = ["FisherEstimator", "borrowed"]


@contextmanager
def borrowed(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lend the model for gradients of ``trained``; it comes back as it was.

    Inside, the model is in eval mode and only ``trained`` requires gradients. Modes,
    ``requires_grad``, ``grad`` and the random state are restored, also on errors.
    """
    config: Any = getattr(model, "config", None)
    problem_type = getattr(config, "problem_type", None)  # set by the first forward
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with torch.random.fork_rng(), torch.enable_grad():
        try:
            model.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            if hasattr(config, "problem_type"):
                config.problem_type = problem_type


class FisherEstimator:
    """Fisher information of entries and scores of samples, from one-sample gradients.

    Args:
        model: The model; use it inside `borrowed`.
        pool: The candidate entries.
        calibration: The samples.
        fisher_type: ``"empirical"`` or ``"sampled"`` labels.
        seed: Seed of the sampled labels; a sample's labels do not depend on the order.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Pool,
        calibration: Calibration,
        fisher_type: str = "empirical",
        seed: int = 0,
    ) -> None:
        self.model = model
        self.pool = pool
        self.calibration = calibration
        self.fisher_type = fisher_type
        self.seed = seed
        self._cached: tuple[tuple[int, ...], Tensor] | None = None

    def fisher(self, samples: tuple[int, ...]) -> Tensor:
        """Return the diagonal Fisher information of all candidates.

        Args:
            samples: Positions in the calibration data.

        Returns:
            Mean squared gradients. Shape ``[len(pool)]``, float32 or better.

        Raises:
            ValueError: If a loss or gradient is not finite, labels are missing or out
                of range, or a parameter gets no gradient from any sample.
        """
        if self._cached is None or self._cached[0] != samples:
            fisher = self._mean(
                samples, "Fisher information", lambda total, g: total.addcmul_(g, g)
            )
            self._cached = (samples, fisher)
        return self._cached[1]

    def mean_gradient(self, samples: tuple[int, ...]) -> Tensor:
        """Return the gradient of the mean loss. Shape ``[len(pool)]``."""
        return self._mean(samples, "Gradients", lambda total, g: total.add_(g))

    def _mean(
        self,
        samples: tuple[int, ...],
        title: str,
        add: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        total = self.pool.zeros()
        views = self.pool.views(total)
        unused = set(range(len(views)))
        for _, gradients in self._gradients(samples, title):
            for i, gradient in gradients.items():
                unused.discard(i)
                add(views[i], gradient)
        self._check_used(unused)
        return total.div_(len(samples))

    def sample_scores(self, samples: tuple[int, ...], entries: Tensor | None) -> Tensor:
        r"""Return the score of each sample, :math:`\sum_{j \in P} g_n[j]^2`.

        Args:
            samples: Positions in the calibration data.
            entries: Sorted flat positions to sum over; None for all candidates.

        Returns:
            Scores in the order of ``samples``. Shape ``[len(samples)]``, float64.
        """
        parts = None if entries is None else self.pool.cut(entries)
        scores = torch.zeros(len(samples), dtype=torch.float64)
        for n, gradients in self._gradients(samples, "Sample scores"):
            for i, gradient in gradients.items():
                chosen = gradient if parts is None else gradient[parts[i]]
                scores[n] += chosen.double().square().sum().cpu()
        return scores

    def _gradients(
        self, samples: Sequence[int], title: str
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Yield each sample's place in ``samples`` and its gradients, flattened."""
        pool = self.pool
        for n, position in enumerate(tqdm(samples, title, leave=False, disable=None)):
            loss = self._loss(position)
            found = torch.autograd.grad(loss, pool.parameters, allow_unused=True)
            gradients = {
                i: (g.to_dense() if g.is_sparse else g)
                .reshape(-1)
                .to(pool.device, pool.accumulator_dtype)
                for i, g in enumerate(found)
                if g is not None
            }
            for i, gradient in gradients.items():
                if not bool(gradient.isfinite().all()):
                    raise ValueError(
                        f"The gradient of '{'.'.join(pool.names[i])}' is not finite on "
                        f"calibration sample {position}. Remove that sample, or load "
                        "the model in float32."
                    )
            yield n, gradients

    def _loss(self, position: int) -> Tensor:
        seed = hash((self.seed, position)) & (2**63 - 1)
        with own_randomness(seed):  # a collator's masks do not depend on the order
            batch = self.calibration.batch(position, self.model)
        if self.calibration.loss is None:
            check_labels(batch, self.model, position)
        if self.fisher_type == "sampled":
            generator = torch.Generator().manual_seed(seed)
            batch = with_sampled_labels(batch, self.model, generator)
        loss = torch.as_tensor(self.calibration.sample_loss(self.model, batch))
        if loss.numel() != 1 or not math.isfinite(loss.item()):
            raise ValueError(
                f"The loss of calibration sample {position} must be one finite number, "
                f"got {loss.tolist()}. Look at that sample and its labels."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"The loss of calibration sample {position} does not depend on any of "
                "the targeted parameters. Check `target_modules` and the loss."
            )
        return loss.reshape(())

    def _check_used(self, unused: set[int]) -> None:
        if unused:
            names = [".".join(self.pool.names[i]) for i in sorted(unused)]
            raise ValueError(
                "These parameters get no gradient from any sample: "
                f"{', '.join(names)}. Name their modules in `exclude_modules`."
            )
