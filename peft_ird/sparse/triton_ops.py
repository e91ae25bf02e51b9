r"""A Triton kernel for chosen entries of a product, :math:`(L^\top R)[p]`.

What limits it is the traffic of the second-level cache: two numbers come in for each
multiplication. So the factors are copied with a row's and a column's tokens side by
side, as loads of single numbers out of rows of another token would bring in 32 bytes
for each two or four. Neighbours in ``places`` share a row, which the first-level cache
has after its first use. Programs that run at the same time work on the same tokens, of
which both factors fit into the second-level cache.

Tiles of used rows and used columns on tensor cores would bring in 128 numbers per token
and tile of 64 x 64, the traffic of 64 to 128 entries of this kernel; a matrix that is
filled so far, two or three percent, is one for `products.by_block`.

Only `products` imports this file, when it is asked for; triton is optional.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["IS_INTERPRETED", "entries"]

_ENTRIES, _TOKENS = 16, 128  # of a program at a time: 16 sums per thread
# Tokens of a program: 4096 rows and 4096 columns of them take 8 MiB in 16 bits.
_CHUNK = 512


def entries(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """Compute chosen entries, the same bits whenever it is called with the same.

    Args:
        left: Floating, any strides. Shape ``[t, r]``.
        right: Floating, any strides. Shape ``[t, c]``.
        places: Flat positions in the product, best ascending. Shape ``[k]``, int64.

    Returns:
        The entries, added up in the type that they have. Shape ``[k]``, float32 or
        float64.
    """
    dtype = torch.promote_types(torch.float32, left.dtype)
    dtype = torch.promote_types(dtype, right.dtype)
    k, tokens = len(places), len(left)
    if not k or not tokens:
        return left.new_zeros(k, dtype=dtype)
    parts = triton.cdiv(tokens, _CHUNK)
    sums = left.new_empty(parts, k, dtype=dtype)
    with torch.cuda.device_of(left):
        rows, columns = _side_by_side(left), _side_by_side(right)
        _kernel[(triton.cdiv(k, _ENTRIES), parts)](
            rows, columns, places, sums, k, right.shape[1], rows.shape[1],
            CHUNK=_CHUNK, ENTRIES=_ENTRIES, TOKENS=_TOKENS,
        )  # fmt: skip
    return sums.sum(0) if parts > 1 else sums[0]


def _side_by_side(side: Tensor) -> Tensor:
    """Return the transposed factor, with zeros up to whole blocks of tokens."""
    tokens, size = side.shape
    copy = side.new_empty(size, triton.cdiv(tokens, _TOKENS) * _TOKENS)
    copy[:, :tokens] = side.t()
    copy[:, tokens:] = 0
    return copy


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    rows,
    columns,
    places,
    sums,
    k,
    width,
    tokens,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    part = tl.program_id(1).to(tl.int64)
    # Past the last entry, the first place is as good as any: it exists.
    place = tl.load(places + entry, mask=entry < k, other=0)
    token = part * CHUNK + tl.arange(0, TOKENS)
    row = rows + (place // width * tokens)[:, None] + token[None, :]
    column = columns + (place % width * tokens)[:, None] + token[None, :]
    dtype = sums.dtype.element_ty
    total = tl.zeros((ENTRIES, TOKENS), dtype)
    for start in range(0, tl.minimum(tokens - part * CHUNK, CHUNK), TOKENS):
        total += tl.load(row + start).to(dtype) * tl.load(column + start).to(dtype)
    tl.store(sums + part * k + entry, tl.sum(total, 1), mask=entry < k)


IS_INTERPRETED = not isinstance(_kernel, triton.runtime.JITFunction)
