"""Types of command-line arguments."""

import argparse
import json
import math
from typing import Any

__all__ = ["amount", "json_object", "natural", "positive", "share"]


def natural(text: str) -> int:
    """Return a whole number, 0 or more."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Return a whole number above 0."""
    return _at_least(1, text)


def amount(text: str) -> float:
    """Return a number, 0 or more."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, finite, got {text}")
    return number


def share(text: str) -> float:
    """Return a number above 0, at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return number


def json_object(text: str) -> dict[str, Any]:
    """Return an object that is written as JSON."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return found


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number
