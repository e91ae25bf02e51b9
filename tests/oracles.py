"""Slow and obvious float64 computations that the package is tested against."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

TOL = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def dense(indices: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Write the values into a zero tensor, one by one."""
    delta = torch.zeros(shape, dtype=values.dtype)
    flat = delta.view(-1)
    for index, value in zip(indices.tolist(), values, strict=True):
        flat[index] += value.detach()
    return delta


def with_dense_deltas(module: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """Copy a module and add dense deltas to its parameters, which require grad."""
    module = copy.deepcopy(module)
    for name, delta in deltas.items():
        parameter = module.get_parameter(name)
        parameter.data += delta.to(parameter.dtype)
        parameter.requires_grad_(True)
    return module


def sample_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str],
    loss: Callable[[nn.Module, Any], Tensor] = lambda m, b: m(**b).loss,
) -> Tensor:
    """Return one flat gradient per batch of one sample. Shape [samples, entries]."""
    model = copy.deepcopy(model).double().eval()
    rows = []
    for batch in batches:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        loss(model, batch).backward()
        parameters = dict(model.named_parameters())
        rows.append(
            torch.cat(
                [
                    torch.zeros(parameters[name].numel(), dtype=torch.float64)
                    if parameters[name].grad is None
                    else parameters[name].grad.flatten()
                    for name in names
                ]
            )
        )
    return torch.stack(rows)


def best(scores: Sequence[float], k: int, largest: bool = True) -> list[int]:
    """Sort everything; the lower position wins a tie."""
    sign = -1 if largest else 1
    order = sorted(range(len(scores)), key=lambda i: (sign * scores[i], i))
    return sorted(order[:k])


def shares(sizes: Sequence[int], k: int) -> list[int]:
    """Give everyone the whole part, and what is left to the largest remainders."""
    exact = [Fraction(k * size, sum(sizes)) for size in sizes]
    parts = [math.floor(part) for part in exact]
    remainders = sorted((math.floor(part) - part, i) for i, part in enumerate(exact))
    for _, i in remainders[: k - sum(parts)]:
        parts[i] += 1
    return parts


def range_decreasing(
    gradients: Tensor,
    samples: list[int],
    cells: Sequence[tuple[int, int]],
    *,
    reverse: bool = False,
    nested: bool = False,
    over_all: bool = False,
) -> tuple[list[int], list[int]]:
    """Walk (samples, entries) cells as the paper's Algorithm 1 and Eqs. 5 and 6 say."""
    squares = gradients.square()
    everything = list(range(squares.shape[1]))

    def fisher(of_samples: list[int]) -> list[float]:
        return squares[of_samples].mean(0).tolist()

    entries = best(fisher(samples), cells[0][1])
    for wanted_samples, wanted_entries in cells[1:]:
        if wanted_samples < len(samples):
            over = everything if over_all else entries
            scores = squares[samples][:, over].sum(1).tolist()
            kept = best(scores, wanted_samples, largest=not reverse)
            samples = [samples[i] for i in kept]
        information = fisher(samples)
        if nested or reverse:
            inside = [information[j] for j in entries]
            kept = best(inside, wanted_entries, largest=not reverse)
            entries = [entries[i] for i in kept]
        else:
            entries = best(information, wanted_entries)
    return samples, entries


def outer_sums(left: Tensor, right: Tensor) -> Tensor:
    """Sum ``left[n, t] x right[n, t]`` over the tokens of each sample, one by one."""
    samples, tokens, rows = left.shape
    total = torch.zeros(samples, rows, right.shape[-1], dtype=torch.float64)
    for n in range(samples):
        for t in range(tokens):
            total[n] += torch.outer(left[n, t].double(), right[n, t].double())
    return total


def row_sums(ids: Tensor, grads: Tensor, rows: int) -> Tensor:
    """Add each token's gradient to the row that it looked up, one by one."""
    total = torch.zeros(len(ids), rows, grads.shape[-1], dtype=torch.float64)
    for n, sample in enumerate(ids.tolist()):
        for t, row in enumerate(sample):
            total[n, row] += grads[n, t].double()
    return total


def coded_indices(indices: Sequence[int], numel: int) -> bytes:
    """Write a bit at a time: all low bits, then the high part of each in unary.

    Every split of the bits and a plain bit per position are tried; the shortest is
    taken, and of equally short ones that with the fewest low bits.
    """
    if len(indices) in {0, numel}:
        return b""
    forms = ["".join("01"[i in set(indices)] for i in range(numel))]
    if numel > 5000:  # the bitmap is never the shortest for the few indices of a test
        forms = []
    for low_bits in range((numel - 1).bit_length() + 1):
        if (numel - 1) >> low_bits > 10_000:
            continue  # nor is this one
        low = "".join(
            "01"[index >> bit & 1] for index in indices for bit in range(low_bits)
        )
        unary, at = "", 0
        for index in indices:
            unary += "0" * ((index >> low_bits) - at) + "1"
            at = index >> low_bits
        unary += "0" * (((numel - 1) >> low_bits) - at)
        forms.append(low + (unary if (numel - 1) >> low_bits else ""))
    return in_bytes(min(forms, key=len))


def in_bytes(bits: str) -> bytes:
    """Pack a string of 0 and 1, the first one lowest."""
    return bytes(
        sum((bit == "1") << place for place, bit in enumerate(bits[start : start + 8]))
        for start in range(0, len(bits), 8)
    )


def decoded_module(
    coded: bytes, numels: dict[str, int], counts: dict[str, int]
) -> dict[str, list[int]]:
    """Read a module's parameters, in alphabetical order, one bit at a time."""
    bits = [byte >> place & 1 for byte in coded for place in range(8)]
    found, start = {}, 0
    for name in sorted(counts):
        k, numel = counts[name], numels[name]
        header = bits[start : start + 64]
        assert sum(bit << place for place, bit in enumerate(header)) == numel
        found[name], used = decoded_indices(bits[start + 64 :], k, numel)
        start += 64 + used
    assert start == len(bits)
    return found


def decoded_indices(bits: list[int], k: int, numel: int) -> tuple[list[int], int]:
    """Return indices, and how many bits they took in whole bytes."""
    if k in {0, numel}:
        return list(range(k)), 0
    splits = range((numel - 1).bit_length() + 1)
    sizes = [(numel, -1)]
    for low_bits in splits:
        high = (numel - 1) >> low_bits
        sizes.append((k * low_bits + (k + high if high else 0), low_bits))
    size, low_bits = min(sizes)
    used = 8 * math.ceil(size / 8)
    if low_bits == -1:
        return [i for i in range(numel) if bits[i]], used
    indices, high, at = [], 0, k * low_bits
    for i in range(k):
        low = bits[i * low_bits : (i + 1) * low_bits]
        while (numel - 1) >> low_bits and not bits[at]:
            high, at = high + 1, at + 1
        at += 1
        low_part = sum(bit << place for place, bit in enumerate(low))
        indices.append((high << low_bits) + low_part)
    return indices, used


def product_entries(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """Compute entries of ``left.T @ right`` in float64, one after the other."""
    width = right.shape[1]
    found = [
        (left[:, place // width].double() * right[:, place % width].double()).sum()
        for place in places.tolist()
    ]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def inclusion_probabilities(weights: Sequence[float], k: int) -> list[float]:
    """How likely each of a few items is among k, drawn one by one by weight."""
    found = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), k):
        chance, left = 1.0, sum(weights)
        for item in order:
            chance *= weights[item] / left
            left -= weights[item]
        for item in order:
            found[item] += chance
    return found


def combined_entries(
    deltas: Sequence[dict[int, float]],
    weights: Sequence[float],
    rule: str,
    density: float = 1.0,
    majority: str = "total",
) -> dict[int, float]:
    """Combine deltas, entry by entry, from position to value; values are distinct."""
    kept = []
    for delta in deltas:
        by_size = sorted(delta.items(), key=lambda item: -abs(item[1]))
        kept.append(dict(by_size[: max(1, int(density * len(delta)))]))
    if rule == "linear":
        kept = list(deltas)
    found = {}
    for position in sorted(set().union(*deltas)):
        pairs = [(w, k[position]) for w, k in zip(weights, kept, strict=True)
                 if position in k]  # fmt: skip
        if rule != "ties":
            found[position] = sum((w * value for w, value in pairs), 0.0)
            continue
        ballot = [v if majority == "total" else math.copysign(1, v) for _, v in pairs]
        sign = 1 if sum(ballot) >= 0 else -1
        elected = [w * value for w, value in pairs if value * sign > 0]
        found[position] = sum(elected) / max(1, len(elected))
    return found
