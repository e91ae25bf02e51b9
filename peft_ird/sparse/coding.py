"""Sorted indices in few bytes, as they lie in an adapter's file.

Of ``k`` indices below ``numel`` the low ``l`` bits are kept as they are, and the rest,
which grows slowly, in unary (Elias-Fano coding: about 2 + log2(numel / k) bits each).
The size depends on ``k`` and ``numel`` alone, so a configuration that has both tells
how much room the file's tensors take. Bits are packed from the lowest of a byte on.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_ird.sparse.delta import check_indices, index_dtype

__all__ = [
    "coded_size",
    "decode",
    "encode",
    "is_blank",
    "pack",
    "packed_size",
    "unpack",
]

_BITMAP = -1  # in place of the number of low bits: one bit per position
_HEADER = 8  # bytes in front of a parameter's code: its number of entries

_CPU = torch.device("cpu")  # of a file, whatever torch's default is


def coded_size(k: int, numel: int) -> int:
    """Return the bytes that `encode` takes.

    Args:
        k: Number of indices.
        numel: Number of entries of the tensor that they point into.
    """
    return _layout(k, numel)[0]


def encode(indices: Tensor, numel: int) -> Tensor:
    """Return sorted indices in coded form.

    Args:
        indices: Distinct flat positions, sorted. Shape ``[k]``, integer.
        numel: Number of entries of the tensor that they point into.

    Returns:
        The code, on the CPU. Shape ``[coded_size(k, numel)]``, uint8.

    Raises:
        ValueError: If the indices are not sorted, distinct and below ``numel``.
    """
    check_indices(indices, numel, "indices")
    indices = indices.detach().cpu().long()
    k = indices.numel()
    size, low_bits = _layout(k, numel)
    if size == 0:
        return torch.empty(0, dtype=torch.uint8, device=_CPU)
    if low_bits == _BITMAP:
        return _to_bytes(_marked(indices, numel))
    low = (indices[:, None] >> torch.arange(low_bits, device=_CPU)) & 1
    high = (indices >> low_bits) + torch.arange(k, device=_CPU)
    marks = _marked(high, _unary_bits(k, numel, low_bits))
    return _to_bytes(torch.cat([low.to(torch.uint8).flatten(), marks]))


def decode(coded: Tensor, k: int, numel: int) -> Tensor:
    """Return the indices that were coded.

    Args:
        coded: What `encode` returned. Shape ``[coded_size(k, numel)]``, uint8.
        k: Number of indices.
        numel: Number of entries of the tensor that they point into.

    Returns:
        Sorted flat positions, on the CPU. Shape ``[k]``, int32 (int64 past 2^31).

    Raises:
        ValueError: If the code has another size, or is none of ``k`` sorted, distinct
            indices below ``numel``.
    """
    size, low_bits = _layout(k, numel)
    if coded.dtype != torch.uint8 or coded.shape != (size,):
        raise ValueError(
            f"The code of {k} indices below {numel} has {size} bytes, got shape "
            f"{tuple(coded.shape)} and dtype {coded.dtype}."
        )
    if size == 0:
        return torch.arange(k, dtype=index_dtype(numel), device=_CPU)
    bits = _to_bits(coded.detach().cpu())
    if low_bits == _BITMAP:
        indices = _marks(bits, 0, numel, k)
    else:
        unary = _unary_bits(k, numel, low_bits)
        low = bits[: k * low_bits].view(k, low_bits).long()
        low <<= torch.arange(low_bits, device=_CPU)
        high = torch.zeros(k, dtype=torch.long, device=_CPU)
        if unary:
            high = _marks(bits, k * low_bits, unary, k) - torch.arange(k, device=_CPU)
        indices = (high << low_bits) + low.sum(1)
    check_indices(indices, numel, "indices")
    return indices.to(index_dtype(numel))


def packed_size(counts: Mapping[str, int], numels: Mapping[str, int]) -> int:
    """Return the bytes that `pack` takes.

    Args:
        counts: Number of indices per parameter of a module.
        numels: Number of entries of each of these parameters.
    """
    return sum(_HEADER + coded_size(k, numels[name]) for name, k in counts.items())


def pack(indices: Mapping[str, Tensor], numels: Mapping[str, int]) -> Tensor:
    """Return the indices of a module's parameters as one tensor.

    One tensor a module keeps the file's table of names short, which is a tenth of a
    small adapter.

    Args:
        indices: Sorted flat positions per parameter. Shape ``[k]`` each.
        numels: Number of entries of each parameter; it is kept before its code.

    Returns:
        Parameters in alphabetical order, on the CPU. Shape ``[packed_size(...)]``,
        uint8.
    """
    parts = [torch.empty(0, dtype=torch.uint8, device=_CPU)]
    for name in sorted(indices):
        size = numels[name].to_bytes(_HEADER, "little")
        parts += [torch.tensor(list(size), dtype=torch.uint8, device=_CPU)]
        parts += [encode(indices[name], numels[name])]
    return torch.cat(parts)


def unpack(
    packed: Tensor, counts: Mapping[str, int], module: str
) -> dict[str, tuple[Tensor, int]]:
    """Return the indices that were packed.

    Args:
        packed: What `pack` returned.
        counts: Number of indices per parameter.
        module: The module's name, for messages.

    Returns:
        Sorted flat positions per parameter, as from `decode`, and the number of
        entries of the tensor that they point into.

    Raises:
        ValueError: If the tensor is no such code.
    """
    packed, start = packed.detach().cpu(), 0
    found: dict[str, tuple[Tensor, int]] = {}
    for name in sorted(counts):
        try:
            header = bytes(packed[start : start + _HEADER].tolist())
            numel = int.from_bytes(header, "little")
            if not counts[name] <= numel < 2**63:
                raise ValueError(f"They cannot lie in a tensor of {numel} entries.")
            start += _HEADER
            size = coded_size(counts[name], numel)
            code = packed[start : start + size]
            found[name] = decode(code, counts[name], numel), numel
            start += size
        except ValueError as error:
            raise ValueError(
                f"The {counts[name]} indices of '{module}.{name}' cannot be decoded. "
                f"{error} The file is damaged; copy it or save the adapter again."
            ) from error
    if start != packed.numel():
        raise ValueError(
            f"The indices of '{module}' should take {start} bytes, got "
            f"{packed.numel()}. The file is damaged, or adapter_config.json belongs to "
            "another one; copy both or save the adapter again."
        )
    return found


def is_blank(packed: Tensor) -> bool:
    """Return whether a packed tensor is all ones, which means: still to be loaded."""
    return packed.numel() > 0 and bool((packed[:_HEADER] == 255).all())


def _layout(k: int, numel: int) -> tuple[int, int]:
    """Return the smallest size in bytes, and the low bits (or `_BITMAP`) for it."""
    if k in {0, numel}:
        return 0, 0
    low_bits = range((numel - 1).bit_length() + 1)
    sizes = {n: k * n + _unary_bits(k, numel, n) for n in low_bits}
    sizes[_BITMAP] = numel
    best = min(sizes, key=lambda n: (sizes[n], n))
    return -(-sizes[best] // 8), best


def _unary_bits(k: int, numel: int, low_bits: int) -> int:
    highest = (numel - 1) >> low_bits
    return k + highest if highest else 0  # without a high part there is nothing to say


def _marked(positions: Tensor, size: int) -> Tensor:
    bits = torch.zeros(size, dtype=torch.uint8, device=_CPU)
    if size:
        bits[positions] = 1
    return bits


def _marks(bits: Tensor, start: int, size: int, k: int) -> Tensor:
    """Return where bits are set; there must be k, and none behind them."""
    found = bits[start:].nonzero().flatten()
    if found.numel() != k or int(found[-1]) >= size:
        raise ValueError(f"It marks {found.numel()} indices.")
    return found


def _to_bytes(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    places = torch.arange(8, dtype=torch.uint8, device=_CPU)
    return (padded.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def _to_bits(coded: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=_CPU)
    return ((coded[:, None] >> places) & 1).flatten()
