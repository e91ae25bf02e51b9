"""What the options of a configuration may be."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

from peft_ird.selection.criteria import METHODS
from peft_ird.selection.entries import SCOPES
from peft_ird.sparse.storage import FORMAT

__all__ = [
    "as_plain",
    "check",
    "check_format",
    "ignores_base_mismatch",
    "ignoring_base_mismatch",
]

_IGNORES = ContextVar("ignores_base_mismatch", default=False)


@contextmanager
def ignoring_base_mismatch() -> Iterator[None]:
    """Load adapters onto base weights that they were not made for.

    For ways to load that do not pass `ignore_base_mismatch` on to the configuration, as
    `load_adapter` and the classes ``AutoPeftModel...``.
    """
    token = _IGNORES.set(True)
    try:
        yield
    finally:
        _IGNORES.reset(token)


def ignores_base_mismatch() -> bool:
    """Return whether configurations are made inside `ignoring_base_mismatch`."""
    return _IGNORES.get()


def as_plain(value: Any) -> Any:
    """Return numbers of another library as Python's own, which JSON knows."""
    if isinstance(value, list):
        return [*map(as_plain, value)]
    if isinstance(value, int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


_CHOICES = {
    "method": METHODS,
    "sample_score": ("selected", "all"),
    "fisher": ("empirical", "sampled"),
    "sample_scaling": ("none", "length", "loss"),
    "scope": SCOPES,
    "save_dtype": (None, "float32", "bfloat16"),
}
_Rule = tuple[str, Callable[[Any], bool]]
_SHARE: _Rule = ("lie in (0, 1]", lambda x: 0 < x <= 1)
_COUNT: _Rule = (
    "be a whole number of at least 1", lambda x: isinstance(x, int) and x >= 1
)  # fmt: skip
_OPTIONAL: dict[str, _Rule] = {  # or None
    "density": _SHARE,
    "initial_density": _SHARE,
    "budget": _COUNT,
    "num_samples": _COUNT,
    "num_ranked_samples": _COUNT,
    "memory_limit": _COUNT,
}
_NUMBERS: dict[str, _Rule] = {
    **_OPTIONAL,
    "head_warmup_steps": (
        "be a whole number of at least 0", lambda x: isinstance(x, int) and x >= 0
    ),
    "head_warmup_learning_rate": ("be above 0", lambda x: x > 0),
    "temperature": ("be 0 or more, and finite", lambda x: 0 <= x < math.inf),
    "trim_samples": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "seed": ("be a whole number", lambda x: isinstance(x, int)),
}  # fmt: skip


def check(config: Any, sized_otherwise: bool) -> None:
    """Check the options by themselves and with each other.

    Args:
        config: An `IRDConfig`.
        sized_otherwise: Whether the entries come from a file, so that neither
            ``density`` nor ``budget`` is needed.

    Raises:
        ValueError: If an option is unknown, out of range, or does not go with others.
    """
    _check_choices(config)
    _check_targets(config)
    _check_size(config, sized_otherwise)
    _check_numbers(config)


def check_format(config: Any) -> None:
    """Check that this version reads the format of a configuration's file.

    Args:
        config: An `IRDConfig`.

    Raises:
        ValueError: If it is of a later version.
    """
    if config.format_version is not None and config.format_version > FORMAT:
        raise ValueError(
            f"The adapter has `format_version` {config.format_version}; this version "
            f"of peft_ird reads up to {FORMAT}. Upgrade peft_ird."
        )


def _check_choices(config: Any) -> None:
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(repr, allowed))}, got "
                f"{getattr(config, name)!r}."
            )


def _check_targets(config: Any) -> None:
    if isinstance(config.modules_to_save, str):
        raise ValueError(
            "`modules_to_save` must be a list of names, got "
            f"{config.modules_to_save!r}. Write [{config.modules_to_save!r}]."
        )
    for name in ("layers_to_transform", "layers_pattern"):
        is_given = getattr(config, name) is not None
        if isinstance(config.target_modules, str) and is_given:
            raise ValueError(
                f"`{name}` cannot be used when `target_modules` is a str; write "
                "the layers into the expression, or pass a list of names."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            "When `layers_pattern` is specified, `layers_to_transform` must also "
            "be specified."
        )


def _check_size(config: Any, sized_otherwise: bool) -> None:
    given = [config.density is not None, config.budget is not None]
    sized_otherwise = (
        sized_otherwise or config.selection is not None or config.method == "bias"
    )
    if all(given) or not (any(given) or sized_otherwise):
        raise ValueError(
            "Pass either `density` (share of the candidates) or `budget` (number "
            f"of entries), got density={config.density} and budget={config.budget}."
        )


def _check_numbers(config: Any) -> None:
    for name, (rule, holds) in _NUMBERS.items():
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not holds(value):
            raise ValueError(f"`{name}` must {rule}, got {value!r}.")
