"""Short hashes that tell whether entries are those of the same base weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["differs", "fingerprint"]

# A model may be saved in one type and loaded in another. Rounding to the narrower of
# the two gives the same bits on both sides; float16 and bfloat16 share no such type.
_KINDS = {
    torch.float64: ("bfloat16", "float16"),
    torch.float32: ("bfloat16", "float16"),
    torch.bfloat16: ("bfloat16",),
    torch.float16: ("float16",),
}


def fingerprint(entries: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Hash a module's weights at an adapter's indices.

    Args:
        entries: Weights per parameter. Shape ``[k]`` each.

    Returns:
        64 bits in hexadecimal for each type that all weights can be rounded to; None
        where weights are not plain floating-point numbers, or not at hand.
    """
    if any(t.is_meta or t.dtype not in _KINDS for t in entries.values()):
        return None
    hashes = {}
    for kind in _KINDS[torch.float32]:
        if all(kind in _KINDS[tensor.dtype] for tensor in entries.values()):
            digest = hashlib.blake2b(digest_size=8)
            for name in sorted(entries):
                rounded = entries[name].detach().to(getattr(torch, kind))
                digest.update(name.encode() + b"\0")
                digest.update(bytes(rounded.view(torch.uint8).cpu().numpy()))
            hashes[kind] = digest.hexdigest()
    return hashes or None


def differs(found: Mapping[str, str] | None, expected: Mapping[str, str]) -> bool:
    """Return whether two fingerprints of a module are surely of other weights.

    Args:
        found: The fingerprint in this model; None if there is none.
        expected: The recorded one.
    """
    common = (found or {}).keys() & expected.keys()
    return any((found or {})[kind] != expected[kind] for kind in common)
