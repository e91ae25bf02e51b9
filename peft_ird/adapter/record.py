"""What a saved adapter says about itself: how it was chosen, and for which weights."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from peft_ird.adapter.modules import base_model, base_modules, layers_of
from peft_ird.layers.kinds import wrap
from peft_ird.selection.selection import Selection
from peft_ird.sparse.fingerprint import differs
from peft_ird.sparse.storage import CODED, VALUES, Entries, plain_name

__all__ = [
    "check_base",
    "fingerprints",
    "holds",
    "missing_codes",
    "provenance",
    "versions",
]

_MOST_SAMPLES = 128  # positions that are written down
_PACKAGES = ("peft_ird", "torch", "peft", "transformers")


def provenance(selection: Selection) -> dict[str, Any]:
    """Return how entries were chosen, and by which versions, as JSON holds it.

    Args:
        selection: The selection.
    """
    return {
        "method": selection.method,
        "seed": selection.seed,
        "num_samples": len(selection.first_samples),
        "samples_kept": len(selection.samples),
        "samples": list(selection.samples[:_MOST_SAMPLES]),
        "stages": [list(cell) for cell in selection.stages],
        "num_candidates": selection.num_candidates,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that a result depends on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return None


def fingerprints(
    model: nn.Module, adapter: str, shapes: Mapping[str, Mapping[str, list[int]]]
) -> dict[str, dict[str, str]] | None:
    """Hash the base weights at an adapter's entries.

    Args:
        model: A model with the adapter, merged or not.
        adapter: The adapter's name.
        shapes: Shapes of the whole parameters; other ones are those of shards.

    Returns:
        The hashes of each module whose weights are at hand; None without any.
    """
    found = {}
    for name, layer in layers_of(model).items():
        whole = all(
            layer._base_parameter(parameter).ndim == len(shape)
            for parameter, shape in shapes.get(name, {}).items()
        )
        hashes = layer.fingerprint(adapter) if whole and name in shapes else None
        if hashes:
            found[name] = hashes
    return found or None


def missing_codes(
    model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the coded indices that tensors have values for, but lack themselves.

    They are no parameters, so ``dict(model.named_parameters())`` has none of them.

    Args:
        model: A model with the adapter.
        adapter: The adapter's name.
        tensors: Tensors of the adapter, as its state dict names them.

    Raises:
        ValueError: If the model has no such indices either.
    """
    layers = layers_of(model)
    found: dict[str, Tensor] = {}
    for key in tensors:
        prefix, has_values, _ = key.partition(VALUES)
        code = f"{prefix}{CODED}.{adapter}"
        if not has_values or code in tensors or code in found:
            continue
        layer = layers.get(plain_name(prefix))
        indices = layer._indices(adapter) if layer is not None else None
        if layer is None or not indices:
            raise ValueError(
                f"`state_dict` has values for '{plain_name(prefix)}' but no indices, "
                f"and the model's adapter '{adapter}' has none there. Pass the state "
                "dict of this model."
            )
        found[code] = layer._code(indices, layer._numels[adapter])
    return found


def holds(model: nn.Module, adapter: str, entries: Entries) -> bool:
    """Return whether an adapter has exactly some entries.

    Args:
        model: A model with the adapter.
        adapter: The adapter's name.
        entries: Indices and values, as read from a file.
    """
    layers = layers_of(model)
    own = {m: layer._indices(adapter) for m, layer in layers.items()}
    own = {module: named for module, named in own.items() if named}
    return own.keys() == entries.keys() and all(
        named.keys() == entries[module].keys()
        and all(torch.equal(at.cpu(), entries[module][n][0]) for n, at in named.items())
        for module, named in own.items()
    )


def check_base(
    model: nn.Module, entries: Entries, expected: Mapping[str, Mapping[str, str]]
) -> None:
    """Check that a model's weights are those that an adapter was made for.

    Args:
        model: The base model, with or without other adapters.
        entries: The adapter's indices, as read from its file.
        expected: What `fingerprints` returned when it was saved.

    Raises:
        ValueError: If a module's weights at the indices are others. Weights that are
            quantised, sharded or offloaded are not compared.
    """
    layers = layers_of(model)
    modules = dict(base_modules(base_model(model)))
    for name, hashes in expected.items():
        if name not in modules or name not in entries:
            continue
        indices = {parameter: at for parameter, (at, _) in entries[name].items()}
        if name in layers:
            found = layers[name].fingerprint("", indices)
        else:
            found = wrap(modules[name]).fingerprint("", indices)
        if differs(found, hashes):
            raise ValueError(
                f"The adapter was made for other base weights: those of '{name}' at "
                f"its entries have the fingerprint {found}, expected {dict(hashes)}. "
                "Load the base model that adapter_config.json names, or load inside "
                "`with peft_ird.ignoring_base_mismatch():` all the same."
            )
