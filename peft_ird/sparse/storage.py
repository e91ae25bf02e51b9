"""Files of tensors: written whole or not at all, checked before they are used."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_ird.sparse.delta import check_indices

__all__ = [
    "check_adapter_file",
    "check_entries",
    "entry_counts",
    "load_tensors",
    "plain_name",
    "save_tensors",
]

INDICES = ".irdelta_indices."
VALUES = ".irdelta_values."
_WEIGHTS_NAME = "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod)(?:\.|$)")

Counts = Mapping[str, Mapping[str, int]]
Shapes = Mapping[str, Mapping[str, "list[int] | torch.Size"]]


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write tensors and JSON metadata to a safetensors file in one step.

    Args:
        path: The file; its folder is created. It appears only once it is complete.
        tensors: Named tensors; dtypes are kept.
        metadata: Anything that JSON holds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
        save_file(contiguous, temporary, metadata={"json": json.dumps(metadata)})
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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


def check_entries(
    tensors: Mapping[str, Tensor], counts: Counts, shapes: Shapes
) -> None:
    """Check an adapter's saved indices and values against what they are meant for.

    Args:
        tensors: Saved tensors; those of the adapter have keys
            ``<module>.irdelta_indices.<parameter>`` and ``….irdelta_values.…``.
        counts: Entries per module and parameter that are expected.
        shapes: Shape of each of these parameters.

    Raises:
        ValueError: If entries are missing or too many, if the counts disagree, or if
            indices repeat, are out of order or exceed the weight.
    """
    expected = {
        f"{module}.{parameter}": (module, parameter)
        for module, parameters in counts.items()
        for parameter in parameters
    }
    found = {_entry_name(key, INDICES): key for key in tensors if INDICES in key}
    values = {_entry_name(key, VALUES): key for key in tensors if VALUES in key}
    for name in sorted(
        expected.keys() ^ found.keys() | expected.keys() ^ values.keys()
    ):
        kind = "missing from" if name in expected else "not announced for"
        raise ValueError(
            f"The entries of '{name}' are {kind} the adapter. adapter_config.json and "
            "the weight file do not belong together; save the adapter again."
        )
    for name, (module, parameter) in expected.items():
        indices, wanted = tensors[found[name]], counts[module][parameter]
        sizes = {wanted, indices.numel(), tensors[values[name]].numel()}
        if len(sizes) > 1:
            raise ValueError(
                f"The counts of '{name}' disagree: adapter_config.json announces "
                f"{wanted} entries, the file has {indices.numel()} indices and "
                f"{tensors[values[name]].numel()} values. Save the adapter again."
            )
        check_indices(indices, torch.Size(shapes[module][parameter]).numel(), name)


def check_adapter_file(
    folder: Path, counts: Counts | None, shapes: Shapes | None
) -> None:
    """Check a saved adapter's weight file, if it lies in a local folder.

    Args:
        folder: The adapter's folder.
        counts: Entries per module and parameter, from its configuration.
        shapes: Shapes of these parameters, from its configuration.

    Raises:
        ValueError: If the file is damaged or disagrees with the configuration.
    """
    path = folder / _WEIGHTS_NAME
    if counts is None or shapes is None or not path.is_file():
        return
    check_entries(load_tensors(path)[0], counts, shapes)


def entry_counts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Return the number of saved values per module and parameter.

    Args:
        tensors: Saved tensors, as for `check_entries`.
    """
    counts: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        if VALUES in key:
            module, _, parameter = plain_name(key).partition(VALUES)
            counts.setdefault(module, {})[parameter] = tensor.numel()
    return counts


def plain_name(key: str) -> str:
    """Return a module's or tensor's name without what wrapping put into it.

    A wrapped module inside a wrapped module has the outer one's ``base_layer`` in it;
    FSDP and the compiler put in parts of their own.
    """
    key = _WRAPPERS.sub("", key).removeprefix(_KEY_PREFIX)
    return re.sub(r"\.base_layer(?=\.|$)", "", key)


def _entry_name(key: str, kind: str) -> str:
    module, _, parameter = plain_name(key).partition(kind)
    return f"{module}.{parameter}"
