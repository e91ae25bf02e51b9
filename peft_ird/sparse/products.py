r"""Chosen entries of a product of two tall matrices, :math:`(L^\top R)[p]`.

The gradient of a linear layer's weight is such a product. Letters in shapes: ``t``
token, ``r`` rows and ``c`` columns of the product, ``k`` entries.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = [
    "HALVES",
    "METHODS",
    "Sampling",
    "available",
    "by_block",
    "by_sampling",
    "by_triton",
    "computable",
    "has_triton",
    "turned",
]

HALVES = (torch.bfloat16, torch.float16)
# A tile of the product stays in the cache until its entries are read.
_TILE_BYTES = 4 << 20
_GPU_TILE_BYTES = 256 << 20  # a GPU wants to be busy
_TURNED = 128  # tokens that a thread transposes at a time, in its cache


def by_block(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """Form the product, in tiles if it is large, and read the entries.

    Args:
        left: Shape ``[t, r]``.
        right: Shape ``[t, c]``.
        places: Ascending flat positions in the product. Shape ``[k]``, integer.

    Returns:
        The entries. Shape ``[k]``, float32 or better.
    """
    rows, width = left.shape[1], right.shape[1]
    tile = _GPU_TILE_BYTES if left.is_cuda else _TILE_BYTES
    step = max(1, tile // max(1, width * torch.float32.itemsize))
    if rows <= step and width < rows and not left.is_cuda:
        # faster with few rows than with few columns
        return _product(right, left).t().flatten().index_select(0, places)
    if rows <= step:
        return _product(left, right).flatten().index_select(0, places)
    starts = range(0, rows, step)
    bounds = torch.tensor([*starts, rows], dtype=places.dtype, device=places.device)
    bounds *= width
    ends = torch.searchsorted(places, bounds).tolist()
    found = [
        _product(left[:, start : start + step], right)
        .flatten()
        .index_select(0, places[first:last] - start * width)
        for start, first, last in zip(starts, ends[:-1], ends[1:], strict=True)
        if first < last
    ]
    return torch.cat(found)


def by_sampling(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """Compute the entries only, one dot product each; as `by_block`."""
    return Sampling.of(places, left.shape[1], right.shape[1])(left, right)


@dataclass(frozen=True)
class Sampling:
    """Entries of a product row by row, for dot products (compressed sparse rows).

    Args:
        bounds: Where the entries of each row begin and end. Shape ``[r + 1]``, int64.
        columns: Column of each entry. Shape ``[k]``, int64.
        width: Number of columns.
    """

    bounds: Tensor
    columns: Tensor
    width: int

    @classmethod
    def of(cls, places: Tensor, rows: int, width: int) -> "Sampling":
        """Return where entries are.

        Args:
            places: As for `by_block`.
            rows: Rows of the product.
            width: Columns of the product.
        """
        places = places.long()
        firsts = torch.arange(rows + 1, device=places.device) * width
        return cls(torch.searchsorted(places, firsts), places % width, width)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the entries of a product; shapes as for `by_block`."""
        zeros = computable(left[:0]).new_zeros(len(self.columns))
        if not len(zeros):
            return zeros
        _warn_of_nothing()
        found = torch.sparse_csr_tensor(
            self.bounds, self.columns, zeros, size=(left.shape[1], self.width),
            check_invariants=False,
        )  # fmt: skip
        for one, other in zip(turned(left), turned(right), strict=True):
            torch.sparse.sampled_addmm(found, one, other.t(), out=found)
        values: Tensor = found.values()
        return values


def turned(matrix: Tensor) -> Iterator[Tensor]:
    """Yield portions of the tokens with those of a column side by side.

    A sampled product is three times faster so, copies included.

    Args:
        matrix: Shape ``[t, c]``.

    Yields:
        Contiguous matrices of shape ``[c, some]``, in float32 or float64; matrices
        with as many tokens are cut alike.
    """
    if not matrix.numel():
        return
    if matrix.device.type != "cpu":
        yield computable(matrix).t().contiguous()
        return
    width, even = matrix.shape[1], len(matrix) // _TURNED * _TURNED
    at_once = torch.get_num_threads() * _TURNED  # sums do not depend on it
    for some in (*matrix[:even].split(at_once), matrix[even:]):
        if len(some):
            each = min(len(some), _TURNED)
            pixels = computable(some).reshape(1, -1, 1, each * width)
            # Images with channels last have a shuffle that transposes the channels of
            # each pixel: by all threads, with vectors, up to ten times as fast as
            # `copy_`.
            shuffled = torch.native_channel_shuffle(pixels.permute(0, 3, 1, 2), each)
            yield from shuffled.permute(0, 2, 3, 1).view(-1, width, each)


def by_triton(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """Compute the entries only, by a kernel; as `by_block`.

    Raises:
        ValueError: If the kernel does not run where the factors are.
    """
    if "triton" not in available(left.device):
        raise ValueError(
            f"Triton does not compute on {left.device}; it takes a CUDA device, or the "
            "environment variable TRITON_INTERPRET=1 before triton is imported."
        )
    found: Tensor = _kernels().entries(left, right, places.long())
    return found


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "block": by_block,
    "sampled": by_sampling,
    "triton": by_triton,
}


def has_triton() -> bool:
    """Return whether triton, which comes with torch's CUDA builds, is installed."""
    return importlib.util.find_spec("triton") is not None


def available(device: torch.device) -> tuple[str, ...]:
    """Return the methods that run on a device, whatever they cost there.

    Args:
        device: Where the factors are.
    """
    runs = has_triton() and (device.type == "cuda" or _kernels().IS_INTERPRETED)
    return tuple(method for method in METHODS if runs or method != "triton")


@cache
def _kernels() -> ModuleType:
    """Return the module that imports triton."""
    return importlib.import_module("peft_ird.sparse.triton_ops")


@cache
def _warn_of_nothing() -> None:
    """Let torch give its warning that CSR is in beta, once, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Under autocast the two may differ: outputs are low, inputs may be float32.
    if left.is_cuda and left.dtype == right.dtype and left.dtype in HALVES:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return computable(left).t() @ computable(right)


def computable(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
