"""What a configuration's file says of each module: one line instead of three trees."""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["from_lines", "to_lines"]

_SCALAR = "scalar"
_PARAMETER = re.compile(rf"(.+?) (\d+) of (\d+(?:x\d+)*|{_SCALAR})(?:, |$)")
_HASH = re.compile(r"(\w+) ([0-9a-f]+)(?:, |$)")

Counts = Mapping[str, Mapping[str, int]]
Shapes = Mapping[str, Mapping[str, "list[int]"]]
Hashes = Mapping[str, Mapping[str, str]]


def to_lines(counts: Counts, shapes: Shapes, hashes: Hashes) -> dict[str, str]:
    """Write what is known of each module as a line.

    Args:
        counts: Entries per module and parameter.
        shapes: Shapes of these parameters.
        hashes: Fingerprints of the base weights at the entries, by type, of all
            modules or of some.

    Returns:
        Lines such as ``"bias 1 of 768, weight 119 of 768x768; bfloat16 92e0, float16
        1b4b"``, by module.
    """
    lines = {}
    for module, named in counts.items():
        parameters = [
            f"{name} {count} of {'x'.join(map(str, shapes[module][name])) or _SCALAR}"
            for name, count in sorted(named.items())
        ]
        known = [f"{kind} {digest}" for kind, digest in hashes.get(module, {}).items()]
        parts = (", ".join(parameters), ", ".join(sorted(known)))
        lines[module] = "; ".join(filter(None, parts))
    return lines


def from_lines(
    lines: Mapping[str, Any],
) -> tuple[
    dict[str, dict[str, int]],
    dict[str, dict[str, list[int]]],
    dict[str, dict[str, str]] | None,
]:
    """Read what `to_lines` wrote.

    Args:
        lines: Lines by module.

    Returns:
        Its arguments; None for the hashes if no module has any.

    Raises:
        ValueError: If a line cannot be read.
    """
    counts: dict[str, dict[str, int]] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    hashes: dict[str, dict[str, str]] = {}
    for module, line in lines.items():
        parameters, _, known = str(line).partition("; ")
        found = _PARAMETER.findall(parameters)
        digests = dict(_HASH.findall(known))
        counts[module] = {name: int(count) for name, count, _ in found}
        shapes[module] = {
            name: [int(size) for size in shape.split("x") if shape != _SCALAR]
            for name, _, shape in found
        }
        if digests:
            hashes[module] = digests
        again = to_lines({module: counts[module]}, shapes, {module: digests})
        if not found or again[module] != line:
            raise ValueError(
                f"`nnz_pattern` says of '{module}' {line!r}, expected such as 'bias 1 "
                "of 768, weight 119 of 768x768; bfloat16 92e0e60a'. "
                "adapter_config.json is damaged; save the adapter again."
            )
    return counts, shapes, hashes or None
