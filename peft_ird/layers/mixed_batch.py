"""Batches in which every sample has an adapter of its own, at inference."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from peft_ird.layers.reading import asked_for

__all__ = ["BASE", "Handed", "by_sample", "handed_out"]

BASE = "__base__"  # PEFT's name for no adapter
_WRONG_LENGTH = (
    "Length of `adapter_names` should be the same as the number of inputs, but got {} "
    "and {} respectively."
)
_INDICES = (torch.int32, torch.int64)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, Tensor)


class Handed(list[str]):
    """The adapter of each sample, as layers are given it.

    Attributes:
        inputs: The tensors that the model is called with.
    """

    inputs: Sequence[Tensor] = ()


@contextmanager
def handed_out(
    tuner: BaseTuner, names: Sequence[str] | None, num_beams: int | None = None
) -> Iterator[None]:
    """Call the layers of tuners with ``adapter_names`` as well, in this thread.

    Args:
        tuner: The tuner whose model is called.
        names: One adapter for each sample of a batch, or `BASE`; None changes nothing.
        num_beams: How often the samples are repeated, but for an encoder.

    Raises:
        ValueError: If the model is in training mode, an adapter is merged, there is
            none of such a name, or, inside, inputs have another number of samples.
    """
    if names is None:
        yield
        return
    modules = [*tuner.model.modules()]
    _check(tuner, names, modules)
    encoder = _encoder(tuner.model)
    inside = set() if encoder is None else {*encoder.modules()}
    once = Handed(names)
    repeated = Handed(n for n in names for _ in range(num_beams or 1))
    given = {
        module: once if module in inside else repeated
        for module in modules
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = [
        (model, partial(_begin, handed=(once, repeated), is_part=model is encoder))
        for model in {tuner.model, encoder or tuner.model}
    ]
    hooks += [(module, partial(_with_names, names=n)) for module, n in given.items()]
    with ExitStack() as stack:
        for module, hook in hooks:
            handle = module.register_forward_pre_hook(_here(hook), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(asked_for(given))
        yield


def _here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that leaves the calls of other threads alone."""
    mine = threading.get_ident()

    def called(*given: Any) -> Any:
        return hook(*given) if threading.get_ident() == mine else None

    return called


def _check(
    tuner: BaseTuner, names: Sequence[str], modules: Sequence[nn.Module]
) -> None:
    if tuner.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode."
        )
    unknown = {*names} - {BASE, *tuner.peft_config}
    if unknown:
        raise ValueError(
            "Trying to infer with non-existing adapter(s): "
            f"{', '.join(sorted(unknown))}"
        )
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in modules):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )


def _begin(
    _: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    handed: Sequence[Handed],
    is_part: bool,
) -> None:
    """Take a look at a model's inputs; refuse those of another number of samples."""
    for each in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(each, Tensor) and each.ndim and len(each) not in map(len, handed):
            raise ValueError(_WRONG_LENGTH.format(len(handed[0]), len(each)))
    inputs = _tensors(args, kwargs)
    for names in handed:
        names.inputs = [*(names.inputs if is_part else ()), *inputs]


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    leaves = tree_leaves(([*args], dict(kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _encoder(model: nn.Module) -> nn.Module | None:
    """Return the encoder beside a decoder."""
    encoder: Any = getattr(model, "get_encoder", lambda: None)()
    is_part = isinstance(encoder, nn.Module) and encoder is not model
    return encoder if is_part else None


def _with_names(
    _: nn.Module, args: Any, kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def by_sample(
    run: Callable[..., Any],
    names: Sequence[str],
    handed: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a module once for each adapter, on the samples that are its.

    Args:
        run: Called with an adapter's name, and then as the module.
        names: The adapter of each sample; `BASE` where it has no entries here.
        handed: What `handed_out` gave the module, and gives those inside of it: they
            see some of the samples only. As it was afterwards.
        args: What the module is called with. The first dimension of tensors is that of
            the samples; if it is one, all samples share it. The same holds of outputs.
        kwargs: The same, by keyword.

    Returns:
        What ``run`` returns for all samples, in their order.

    Raises:
        ValueError: If what the module takes or returns cannot be split by sample.
    """
    samples: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        samples.setdefault(name, []).append(i)
    if len(samples) == 1:
        tree_map_only(Tensor, partial(_check_size, of=len(names)), (args, dict(kwargs)))
        return run(names[0], *args, **kwargs)
    for leaf in tree_leaves((args, dict(kwargs))):
        _check_splits(leaf, len(names), getattr(handed, "inputs", ()))
    _check_some_split(_tensors(args, kwargs), len(names))

    def part(rows: list[int], given: Any) -> Any:
        return tree_map_only(Tensor, partial(_rows, rows=rows), given)

    outputs = []
    for name, rows in samples.items():
        with _narrowed(handed, rows):
            outputs.append(run(name, *part(rows, args), **part(rows, dict(kwargs))))
    return tree_map(partial(_together, [*samples.values()]), *outputs)


def _together(rows: Sequence[list[int]], *parts: Any) -> Any:
    """Put what a module returns for some samples each into the order of all."""
    first = parts[0]
    if not isinstance(first, Tensor):
        _check_splits(first, len(rows))
        if any(part != first for part in parts):
            raise ValueError(
                f"A module that returns {first!r} for some samples and something else "
                "for others cannot mix adapters."
            )
        return first
    for part, each in zip(parts, rows, strict=True):
        _check_size(part, len(each), is_split=True)
        if not part.ndim:
            raise ValueError(
                "A single number is of no sample, so that the module which returns it "
                "cannot mix adapters."
            )
    order = torch.tensor([i for each in rows for i in each], device=first.device)
    every = [_expanded(part, len(each)) for part, each in zip(parts, rows, strict=True)]
    return torch.cat(every).index_select(0, order.argsort())


@contextmanager
def _narrowed(names: Sequence[str], rows: list[int]) -> Iterator[None]:
    """Leave the names of some samples in a list for a while."""
    if not isinstance(names, list):
        yield
        return
    whole = list(names)
    names[:] = [whole[i] for i in rows]
    try:
        yield
    finally:
        names[:] = whole


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    if tensor.ndim == 0 or len(tensor) == 1:
        return tensor  # all samples share it, or it is a single token's
    return tensor[torch.tensor(rows, device=tensor.device)]


def _expanded(tensor: Tensor, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape[1:]) if tensor.ndim else tensor


def _check_splits(given: Any, of: int, inputs: Sequence[Tensor] = ()) -> None:
    """Refuse what has no row for each of the samples, or may have tokens in rows."""
    if not isinstance(given, _PLAIN):
        raise ValueError(
            f"A {type(given).__name__} cannot be split by sample, so that the module "
            "which takes it cannot mix adapters. Caches are left out by "
            "`use_cache=False`."
        )
    if not isinstance(given, Tensor):
        return
    _check_size(given, of, is_split=True)
    if given.dtype in _INDICES and given.ndim and _may_be_tokens(given, inputs):
        raise ValueError(
            f"Whether these {of} rows are samples or tokens, as many of both as there "
            "are, cannot be told of indices that the model makes itself. Pad the "
            "samples by a token, or leave these embeddings out of adapters that are "
            "mixed."
        )


def _check_some_split(tensors: Sequence[Tensor], of: int) -> None:
    """Refuse numbers that all samples share: what they become may be no row of each."""
    is_split = any(len(each) == of for each in tensors if each.ndim)
    if not is_split and any(t.is_floating_point() for t in tensors if t.ndim):
        raise ValueError(
            f"A module that is called with one row for all {of} samples cannot mix "
            "adapters. Leave it out of them by `exclude_modules`."
        )


def _may_be_tokens(indices: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Return whether a table of positions, or of distances, may look like this."""
    is_given = any(
        each.numel() == indices.numel() and indices.flatten().equal(each.flatten())
        for each in inputs
    )
    are_many = any(each.shape[1:2] == indices.shape[:1] for each in inputs)
    return are_many and not is_given and bool((indices != indices[:1]).any())


def _check_size(tensor: Tensor, of: int, is_split: bool = False) -> None:
    size = len(tensor) if tensor.ndim else 1
    # All tokens in one dimension are no hindrance while nothing is split.
    if size in {1, of} or not (is_split or size % of):
        return
    raise ValueError(
        f"{_WRONG_LENGTH.format(of, size)} Modules that take the samples in another "
        "form, as all tokens in one dimension, cannot mix adapters."
    )
