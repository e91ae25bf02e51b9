r"""Measure what choosing samples does to Fisher information, in a linear model.

python benchmarks/sample_alignment.py      # half a minute

The model is :math:`y = \theta \cdot x + \varepsilon` with Gaussian inputs
:math:`x \sim N(0, S)` and noise of variance 1, so its Fisher information is
:math:`F = E[x x^\top] = S`. Section 4.4 of the paper argues in it for Iterative Range
Decreasing: an estimate from n random samples has no bias and much variance; samples
along a direction u, :math:`x = a u`, have less variance and show u; so should samples
of large Fisher information.

What is seen (the numbers are in the result file; a mask has 4 of 32 weights, and one at
random would find an eighth of the true one):

- Samples along the leading eigenvector vary ten times less than random ones and give
  the better mask from up to 64 of them. More of them do not help: their bias stays.
  And the direction is what one wanted to know.
- Samples along another eigenvector vary least of all, and their mask is a random one's:
  a low variance says that the answer is always the same, not that it is right.
- The method takes the largest scores of a pool. As an estimate of F this is worse in
  both ways, larger by far and more varied. A mask does not see the scale, and scaled,
  few such samples stand for the whole pool: its mask is as good as the pool's from 64
  of 512 on, and not better than that from any number.
- With gradients of labels the same holds as long as labels are right. If a twentieth is
  wrong, the largest scores are theirs: all of the first 8. The mask comes down to that
  of the spoilt pool at best. Without the tenth of the largest (``trim_samples``) it is
  much better there from 16 samples on, and worse where all labels were right.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from record import RESULTS, git_state, machine, versions, write
from torch import Tensor

SIZE = 32  # weights; the i-th eigenvalue of S is 1 / i
KEPT = 4  # weights in a mask
POOL = 512  # samples to choose from
COUNTS = tuple(2**i for i in range(10))  # up to the whole pool
OTHER = 8  # which eigenvector, from 0, is a direction that does not lead
REST = 0.1  # what samples along a direction keep of all others
TRIM = 0.1  # share of the pool that is left out for the largest scores
WRONG, SHIFT = 0.05, 10.0  # share of wrong labels, and their standard deviation
LABELS = ("right", "wrong anywhere", "wrong along another")
Record = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Inputs of a linear model: the eigenvectors of their covariance, as columns."""

    vectors: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator) -> "Model":
        """Draw a model whose weights matter in an order of its own."""
        return cls(torch.linalg.qr(_normal(generator, SIZE, SIZE))[0])

    @property
    def values(self) -> Tensor:
        """Eigenvalues of the covariance. Shape ``[SIZE]``."""
        return 1 / torch.arange(1, SIZE + 1, dtype=torch.float64)

    @property
    def fisher(self) -> Tensor:
        """The Fisher information. Shape ``[SIZE, SIZE]``."""
        return (self.vectors * self.values) @ self.vectors.T

    def inputs(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Draw inputs. Shape ``[*shape, SIZE]``."""
        scaled = _normal(generator, *shape, SIZE) * self.values.sqrt()
        return scaled @ self.vectors.T

    def aligned(self, generator: torch.Generator, which: int, *shape: int) -> Tensor:
        """Draw inputs along an eigenvector, as far along as other inputs are."""
        along = self.values[which].sqrt() * _normal(generator, *shape, 1)
        return along * self.vectors[:, which] + REST * self.inputs(generator, *shape)

    def residuals(
        self, generator: torch.Generator, labels: str, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw what labels differ by from the model's output, and which are wrong.

        Wrong labels are anywhere, or where inputs reach far along `OTHER`.
        """
        noise = _normal(generator, *inputs.shape[:-1])
        if labels == "right":
            return noise, torch.zeros_like(noise, dtype=torch.bool)
        reach = (inputs @ self.vectors[:, OTHER]).abs()
        anywhere = torch.rand(noise.shape, generator=generator, dtype=noise.dtype)
        rank = reach if labels == "wrong along another" else anywhere
        wrong = rank >= rank.quantile(1 - WRONG, dim=-1, keepdim=True)
        return torch.where(wrong, SHIFT * noise, noise), wrong


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write one result file.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=list(range(8)), help="one per model")
    add("--repeats", type=int, default=200, help="draws of samples per model")
    add("--output", type=Path, default=RESULTS / "sample-alignment.json")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    models = [list(measure(seed, options.repeats)) for seed in options.seeds]
    settings = {"seeds": options.seeds, "repeats": options.repeats, "pool": POOL}
    results = {
        "settings": {**settings, "size": SIZE, "kept": KEPT, "wrong": WRONG},
        "versions": versions(),
        "machine": machine(),
        "git": git_state(),
        "closed_form": {n: gaussian_variance(n) for n in COUNTS},
        "rows": [summarise(rows) for rows in zip(*models, strict=True)],
        "seconds": time.perf_counter() - start,
    }
    write(options.output, results)
    print(table(results))


def measure(seed: int, repeats: int) -> Iterator[Record]:
    """Judge every choice of samples in one model.

    Args:
        seed: Seed of the model and of all its samples.
        repeats: How many pools to choose from.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Model.draw(generator)
    pool = model.inputs(generator, repeats, POOL)
    ranked = by_score(pool)
    for n in COUNTS:
        yield _row(model, "random", n, pool[:, :n])
        for choice, which in (("along the leading", 0), ("along another", OTHER)):
            inputs = model.aligned(generator, which, repeats, n)
            yield _row(model, choice, n, inputs, along=which)
        yield _row(model, "largest", n, _taken(pool, ranked[:, :n]))
    for labels in LABELS:
        residuals, wrong = model.residuals(generator, labels, pool)
        gradients = residuals[:, :, None] * pool
        ranked = by_score(gradients)
        orders = {
            "random": torch.arange(POOL).expand_as(ranked),
            "largest": ranked,
            "trimmed": ranked[:, int(TRIM * POOL) :],
        }
        for choice, order in orders.items():
            for n in (n for n in COUNTS if n <= order.shape[1]):
                taken = order[:, :n]
                row = _row(model, choice, n, _taken(gradients, taken), labels)
                yield row | {"mislabelled": _share(wrong.gather(1, taken))}


def by_score(gradients: Tensor) -> Tensor:
    """Sort samples by their score on the pool's own mask, the largest first.

    Args:
        gradients: Of each sample. Shape ``[repeats, samples, weights]``.

    Returns:
        Their positions, as the first step of the method has them. Shape
        ``[repeats, samples]``.
    """
    squares = gradients.square()
    mask = squares.mean(1, keepdim=True).topk(KEPT).indices
    scores = squares.gather(2, mask.expand(-1, squares.shape[1], -1)).sum(2)
    return scores.argsort(descending=True)


def judge(fishers: Tensor, truth: Tensor) -> dict[str, float]:
    """Say how far estimates are from the Fisher information, and how they point.

    Args:
        fishers: Independent estimates. Shape ``[repeats, weights, weights]``.
        truth: What they estimate. Shape ``[weights, weights]``.

    Returns:
        Variance and squared bias over the squared norm of the truth, as they are and
        scaled by the one factor that brings the mean estimate closest to the truth, as
        a mask does not depend on scale (the bias is then the squared sine between
        both); the mean angle to the leading eigenvector in degrees; the share of the
        true mask that the diagonal finds.
    """
    average, size = fishers.mean(0), truth.square().sum()
    spread = (fishers - average).square().sum() / (len(fishers) - 1)
    noise = spread / len(fishers)  # what the average still varies by
    common = (average * truth).sum()
    scale = common / (average.square().sum() - noise)
    found, wanted = (_mask(each) for each in (fishers, truth))
    return {
        "variance": float(spread / size),
        "bias": float(((average - truth).square().sum() - noise) / size),
        "scaled_variance": float(scale**2 * spread / size),
        "scaled_bias": float(1 - scale * common / size),
        "angle": _angle(leading(fishers), leading(truth)),
        "overlap": _share(found & wanted) * SIZE / KEPT,
    }


def gaussian_variance(n: int) -> float:
    r"""Return :math:`E \|F_n - F\|^2 / \|F\|^2 = (tr^2 S + tr S^2) / (n\, tr S^2)`.

    It is that of n random samples, where :math:`x \sim N(0, S)` and :math:`F = S`.
    """
    values = [1 / i for i in range(1, SIZE + 1)]
    squares = sum(value**2 for value in values)
    return (sum(values) ** 2 + squares) / (n * squares)


def leading(matrices: Tensor) -> Tensor:
    """Return the eigenvectors of the largest eigenvalues. Shape ``[*, weights]``."""
    return torch.linalg.eigh(matrices).eigenvectors[..., -1]


def summarise(rows: Sequence[Record]) -> Record:
    """Return means and standard deviations over models, of the same choice."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    facts = {name: value for name, value in rows[0].items() if name not in names}
    values = {name: [row[name] for row in rows] for name in names}
    spread = {k: stdev(v) if len(v) > 1 else 0.0 for k, v in values.items()}
    return {**facts, "mean": {k: mean(v) for k, v in values.items()}, "sd": spread}


def table(results: Record) -> str:
    """Return one line per choice of samples."""
    names = ("variance", "bias", "scaled_variance", "scaled_bias", "angle", "overlap")
    lines = ["  n  " + "".join(f"{name:>16}" for name in names)]
    for row in results["rows"]:
        cells = "".join(f"{row['mean'][name]:16.3f}" for name in names)
        wrong = row["mean"].get("mislabelled", 0.0)
        what = f"{row['choice']}, labels {row['labels']}, {wrong:.0%} of them wrong"
        lines.append(
            f"{row['n']:4} {cells}  {what if row['labels'] else row['choice']}"
        )
    return "\n".join(lines)


def _row(
    model: Model,
    choice: str,
    n: int,
    gradients: Tensor,
    labels: str | None = None,
    along: int = 0,
) -> Record:
    fishers = gradients.transpose(1, 2) @ gradients / gradients.shape[1]
    own = _angle(leading(fishers), model.vectors[:, along])
    judged = judge(fishers, model.fisher)
    return {"choice": choice, "labels": labels, "n": n, **judged, "angle_to_own": own}


def _taken(gradients: Tensor, positions: Tensor) -> Tensor:
    return gradients.gather(1, positions[:, :, None].expand(-1, -1, SIZE))


def _mask(fishers: Tensor) -> Tensor:
    """Return which weights are among the `KEPT` of the largest diagonal entries."""
    diagonal = fishers.diagonal(dim1=-2, dim2=-1)
    empty = torch.zeros_like(diagonal, dtype=torch.bool)
    return empty.scatter(-1, diagonal.topk(KEPT).indices, value=True)


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _angle(vectors: Tensor, other: Tensor) -> float:
    cosines = (vectors @ other).abs().clamp(max=1)
    return float(cosines.acos().rad2deg().mean())


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


if __name__ == "__main__":
    main()
