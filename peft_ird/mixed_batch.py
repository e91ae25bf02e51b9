"""Batches in which every sample has an adapter of its own, at inference."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

__all__ = ["BASE", "by_sample", "handed_out"]

BASE = "__base__"  # PEFT's name for no adapter
_WRONG_LENGTH = (
    "Length of `adapter_names` should be the same as the number of inputs, but got {} "
    "and {} respectively."
)


@contextmanager
def handed_out(
    tuner: BaseTuner, names: Sequence[str] | None, num_beams: int | None = None
) -> Iterator[None]:
    """Call the layers of tuners with ``adapter_names`` as well.

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
    inside = _encoder_modules(tuner.model)
    once, repeated = list(names), [n for n in names for _ in range(num_beams or 1)]
    with ExitStack() as hooks:
        check = partial(_check_length, allowed=(len(once), len(repeated)))
        handle = tuner.model.register_forward_pre_hook(check, with_kwargs=True)
        hooks.callback(handle.remove)
        for module in modules:
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                given = once if module in inside else repeated
                hook = partial(_with_names, names=given)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
        yield


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


def _check_length(
    _: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], allowed: Sequence[int]
) -> None:
    """Refuse a model's inputs that are of another number of samples."""
    given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    for each in given:
        if isinstance(each, Tensor) and each.ndim and len(each) not in allowed:
            raise ValueError(_WRONG_LENGTH.format(allowed[0], len(each)))


def _encoder_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of an encoder beside a decoder."""
    encoder: Any = getattr(model, "get_encoder", lambda: None)()
    is_part = isinstance(encoder, nn.Module) and encoder is not model
    return {*encoder.modules()} if is_part else set()


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
            the samples; if it is one, all samples share it.
        kwargs: The same, by keyword.

    Returns:
        What ``run`` returns for all samples, in their order.

    Raises:
        ValueError: If a tensor has another number of samples.
    """
    samples: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        samples.setdefault(name, []).append(i)
    if len(samples) == 1:
        tree_map_only(Tensor, partial(_check_size, of=len(names)), (args, dict(kwargs)))
        return run(names[0], *args, **kwargs)

    def part(rows: list[int], given: Any) -> Any:
        return tree_map_only(Tensor, partial(_rows, rows=rows, of=len(names)), given)

    outputs = []
    for name, rows in samples.items():
        with _narrowed(handed, rows):
            outputs.append(run(name, *part(rows, args), **part(rows, dict(kwargs))))
    order = torch.tensor([i for rows in samples.values() for i in rows]).argsort()

    def together(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        return torch.cat(parts).index_select(0, order.to(parts[0].device))

    return tree_map(together, *outputs)


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


def _rows(tensor: Tensor, rows: list[int], of: int) -> Tensor:
    if tensor.ndim == 0:
        return tensor
    if len(tensor) == 1:
        return tensor.expand(len(rows), *tensor.shape[1:])
    _check_size(tensor, of, is_split=True)
    return tensor[torch.tensor(rows, device=tensor.device)]


def _check_size(tensor: Tensor, of: int, is_split: bool = False) -> None:
    size = len(tensor) if tensor.ndim else 1
    # All tokens in one dimension are no hindrance while nothing is split.
    if size in {1, of} or not (is_split or size % of):
        return
    raise ValueError(
        f"{_WRONG_LENGTH.format(of, size)} Modules that take the samples in another "
        "form, as all tokens in one dimension, cannot mix adapters."
    )
