"""Arguments of torch functions by name."""

import inspect
from functools import cache
from typing import Any

__all__ = ["bind"]


@cache
def _signature(func: Any) -> inspect.Signature:
    return inspect.signature(func)


def bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included.

    Args:
        func: A Python function.
        args: Its arguments by position.
        kwargs: Its arguments by name.
    """
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
