"""Files of tensors: written whole or not at all, checked before they are used."""

import json
import os
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_ird.sparse.coding import pack, unpack
from peft_ird.sparse.delta import check_indices

__all__ = [
    "CODED",
    "FORMAT",
    "VALUES",
    "Entries",
    "entry_counts",
    "load_tensors",
    "name_alone",
    "plain_name",
    "read_adapter_file",
    "read_entries",
    "replaced_modules",
    "replacing",
    "save_tensors",
    "unwrapped_name",
    "with_coded_indices",
]

FORMAT = 3  # 1 had plain indices, a tensor for each of values; 2 longer settings
CODED = ".irdelta_coded"
PLAIN = ".irdelta_indices."
VALUES = ".irdelta_values."
_WEIGHTS_NAME = "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
_BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod)(?:\.|$)")

Counts = Mapping[str, Mapping[str, int]]
Shapes = Mapping[str, Mapping[str, "list[int] | torch.Size"]]
Entries = Mapping[str, Mapping[str, tuple[Tensor, int]]]


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write tensors and JSON metadata to a safetensors file in one step.

    Args:
        path: The file; its folder is created. It appears only once it is complete.
        tensors: Named tensors; dtypes are kept.
        metadata: Anything that JSON holds.
    """
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"json": json.dumps(metadata)})


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lend a temporary name beside a file that appears only once it is complete.

    Args:
        path: The file; its folder is created.

    Yields:
        Where to write it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # tempfile would leave a file that only its owner may read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and the JSON metadata in it.

    Args:
        path: The file.

    Returns:
        The named tensors, on the CPU, and the metadata (empty if there is none).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = (file.metadata() or {}).get("json", "{}")
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' cannot be read as a safetensors file: {error}. It may have been "
            "cut short while it was copied; save it again."
        ) from error
    return tensors, json.loads(metadata)


def read_entries(
    tensors: Mapping[str, Tensor], counts: Counts, shapes: Shapes
) -> Entries:
    """Return an adapter's saved indices, checked against what they are meant for.

    Args:
        tensors: Saved tensors; those of the adapter have keys
            ``<module>.irdelta_coded`` and ``<module>.irdelta_values.<parameter>``.
        counts: Entries per module and parameter that are expected.
        shapes: Shape of each of these parameters.

    Returns:
        Per module and parameter the sorted flat positions, on the CPU, and the entries
        of the parameter that they were saved for.

    Raises:
        ValueError: If entries are missing or too many, if the counts disagree, or if
            indices repeat, are out of order or exceed the weight.
    """
    coded = {plain_name(k).removesuffix(CODED): t for k, t in tensors.items()
             if k.endswith(CODED)}  # fmt: skip
    saved = entry_counts(tensors)
    _check_names({(m, n) for m in counts for n in counts[m]},
                 {(m, n) for m in saved for n in saved[m]})  # fmt: skip
    _check_names({(m, "indices") for m in counts}, {(m, "indices") for m in coded})
    entries: dict[str, dict[str, tuple[Tensor, int]]] = {}
    for module, wanted in counts.items():
        for name, count in wanted.items():
            if count != saved[module][name]:
                raise ValueError(
                    f"The counts of '{module}.{name}' disagree: adapter_config.json "
                    f"announces {count} entries, the file has {saved[module][name]} "
                    "values. Save the adapter again."
                )
        entries[module] = unpack(coded[module], wanted, module)
        for name, (indices, _) in entries[module].items():
            numel = torch.Size(shapes[module][name]).numel()
            check_indices(indices, numel, f"{module}.{name}")
    return entries


def _check_names(expected: set[tuple[str, str]], found: set[tuple[str, str]]) -> None:
    for name in sorted(expected ^ found):
        kind = "missing from" if name in expected else "not announced for"
        raise ValueError(
            f"The entries of '{'.'.join(name)}' are {kind} the adapter. "
            "adapter_config.json and the weight file do not belong together; save the "
            "adapter again."
        )


def read_adapter_file(
    folder: Path, counts: Counts | None, shapes: Shapes | None
) -> tuple[Entries, set[str]] | None:
    """Read and check a saved adapter's indices, if its file lies in a local folder.

    Args:
        folder: The adapter's folder.
        counts: Entries per module and parameter, from its configuration.
        shapes: Shapes of these parameters, from its configuration.

    Returns:
        As `read_entries`, and what `replaced_modules` returns; None if there is no
        such file.

    Raises:
        ValueError: If the file is damaged or disagrees with the configuration.
    """
    path = folder / _WEIGHTS_NAME
    if counts is None or shapes is None or not path.is_file():
        return None
    tensors = with_coded_indices(load_tensors(path)[0], shapes)
    return read_entries(tensors, counts, shapes), replaced_modules(tensors)


def with_coded_indices(
    tensors: Mapping[str, Tensor], shapes: Shapes
) -> dict[str, Tensor]:
    """Return saved tensors in the present format, whichever they were saved in.

    Args:
        tensors: Saved tensors, of format 1 or 2.
        shapes: Shapes of the parameters that have entries.

    Raises:
        ValueError: If indices of format 1 repeat, are out of order or exceed the
            weight.
    """
    found = dict(tensors)
    plain: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        if PLAIN in key:
            prefix, _, parameter = key.partition(PLAIN)
            plain.setdefault(prefix, {})[parameter] = found.pop(key)
    for prefix, indices in plain.items():
        named = shapes.get(plain_name(prefix), {})
        numels = {name: torch.Size(named.get(name, ())).numel() for name in indices}
        for name, positions in indices.items():
            check_indices(positions, numels[name], f"{plain_name(prefix)}.{name}")
        found[prefix + CODED] = pack(indices, numels)
    return found


def entry_counts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Return the number of saved values per module and parameter.

    Args:
        tensors: Saved tensors, as for `read_entries`.
    """
    counts: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        if VALUES in key:
            module, _, parameter = plain_name(key).partition(VALUES)
            counts.setdefault(module, {})[parameter] = tensor.numel()
    return counts


def replaced_modules(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the modules whose own parameters are saved too, as resized embeddings.

    Args:
        tensors: Saved tensors.
    """
    own = [k for k in tensors if not any(part in k for part in (VALUES, CODED, PLAIN))]
    return {plain_name(key).rpartition(".")[0] for key in own}


def plain_name(key: str) -> str:
    """Return a saved tensor's name as `unwrapped_name` has it in the base model.

    Args:
        key: The name in PEFT's model.
    """
    return unwrapped_name(_WRAPPERS.sub("", key).removeprefix(_KEY_PREFIX))


def unwrapped_name(name: str) -> str:
    """Return a name in a base model without what wrapping put into it.

    A wrapped module inside a wrapped module has the outer one's ``base_layer`` in it;
    FSDP and the compiler put in parts of their own.

    Args:
        name: The name of a module or tensor.
    """
    return _BASE_LAYER.sub("", _WRAPPERS.sub("", name))


def name_alone(key: str, modules: Collection[str]) -> str:
    """Return a tensor's name as it is in a model that has one adapter only.

    Args:
        key: The name where other adapters may have wrapped more modules.
        modules: Plain names of the modules in which the adapter has entries.
    """
    outer, *inner = _BASE_LAYER.split(key)
    for part in inner:
        outer += ".base_layer" * (plain_name(outer) in modules) + part
    return outer
