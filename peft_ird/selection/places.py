"""Where entries lie: counted per parameter, summed over modules, kinds or layers."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["OUTSIDE", "Place", "find_places", "layer_order", "split_names"]

K = TypeVar("K")
OUTSIDE = "outside"
_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Place:
    """The entries in one part of a model.

    Args:
        entries: Their number.
        share: Their share of all entries of the selection.
        density: Their share of the parameters that hold them; parameters of this part
            without any entry are not counted.
        rows: Share of the rows of its 2-D weights that hold an entry; None where no
            2-D weight holds one.
        columns: The same for columns.
    """

    entries: int
    share: float
    density: float
    rows: float | None
    columns: float | None


class _Counts(NamedTuple):
    entries: int
    numel: int
    used_rows: int = 0
    rows: int = 0
    used_columns: int = 0
    columns: int = 0


def find_places(
    indices: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    key: Callable[[str, str], K],
) -> dict[K, Place]:
    """Sum entries up over parameters that have the same key.

    Args:
        indices: Flat row-major positions, ``{module: {parameter: [k]}}``.
        shapes: Shape of each of these parameters; their order is kept.
        key: What a module's and a parameter's name are summed under.

    Returns:
        Where the entries lie; empty if there are none.
    """
    counts: dict[K, list[_Counts]] = {}
    for module, parameters in shapes.items():
        for name, shape in parameters.items():
            positions = indices.get(module, {}).get(name)
            if positions is not None and positions.numel():
                each = counts.setdefault(key(module, name), [])
                each.append(_count(positions, shape))
    sums = {k: _Counts(*map(sum, zip(*v, strict=True))) for k, v in counts.items()}
    total = sum(each.entries for each in sums.values())
    return {k: _place(each, total) for k, each in sums.items()}


def split_names(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Tell a module's kind from its layer, which is the first number in its name.

    The kind of ``bert.encoder.layer.3.attention.self.query`` is
    ``attention.self.query``. Further numbers become ``*``, so experts are of one kind.
    Where a model has several stacks of layers, the kind begins with the stack.

    Args:
        modules: Names of modules of one model.

    Returns:
        Kind and layer by name. The layer of modules in no layer is `OUTSIDE`.
    """
    found = {name: _NUMBER.search(name) for name in modules}
    stacks = {n[: match.start()].rstrip(".") for n, match in found.items() if match}
    labels = _distinctive(sorted(stacks))
    in_all = _num_common([name.split(".")[:-1] for name in found])
    split = {}
    for name, match in found.items():
        if match is None:
            split[name] = ".".join(name.split(".")[in_all:]), OUTSIDE
            continue
        label = labels[name[: match.start()].rstrip(".")]
        rest = re.sub(r"(?<![^.])\d+(?![^.])", "*", name[match.end() :])
        split[name] = ".".join(filter(None, [label, rest])) or "*", match[1]
    return split


def layer_order(layer: str) -> tuple[bool, int]:
    """Sort layers by number, `OUTSIDE` last.

    Args:
        layer: As `split_names` has it.
    """
    return (True, 0) if layer == OUTSIDE else (False, int(layer))


def _count(indices: Tensor, shape: Sequence[int]) -> _Counts:
    size = _Counts(indices.numel(), torch.Size(shape).numel())
    if len(shape) != 2:
        return size
    rows, columns = shape
    return size._replace(
        used_rows=_num_distinct(indices // columns, rows),
        rows=rows,
        used_columns=_num_distinct(indices % columns, columns),
        columns=columns,
    )


def _num_distinct(positions: Tensor, size: int) -> int:
    seen = torch.zeros(size, dtype=torch.bool)
    seen[positions.long()] = True
    return int(seen.sum())


def _place(counts: _Counts, total: int) -> Place:
    return Place(
        entries=counts.entries,
        share=counts.entries / total,
        density=counts.entries / counts.numel,
        rows=counts.used_rows / counts.rows if counts.rows else None,
        columns=counts.used_columns / counts.columns if counts.columns else None,
    )


def _distinctive(names: Sequence[str]) -> dict[str, str]:
    """Return names without the parts that all of them begin and end with."""
    parts = [name.split(".") for name in names]
    start = _num_common(parts)
    parts = [each[start:] for each in parts]
    end = _num_common([each[::-1] for each in parts])
    kept = [".".join(each[: len(each) - end]) for each in parts]
    return dict(zip(names, kept, strict=True))


def _num_common(rows: Sequence[Sequence[str]]) -> int:
    """Return how many items at the beginning are the same in all rows."""
    columns = enumerate(zip(*rows, strict=False))
    shortest = min(map(len, rows), default=0)
    return next((i for i, column in columns if len(set(column)) > 1), shortest)
