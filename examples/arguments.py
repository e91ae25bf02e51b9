"""Types of command-line arguments."""

import argparse

__all__ = ["natural", "positive"]


def natural(text: str) -> int:
    """Return a whole number, 0 or more."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Return a whole number above 0."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number
