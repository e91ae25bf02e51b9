"""Rows of figures beside the bars that they are held to, and the table they make."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple


class Row(NamedTuple):
    """A line of a table: its title, a text per column, and the bar."""

    title: str
    texts: dict[str, str]
    bar: str = ""


def rated(
    title: str,
    values: Mapping[str, float],
    form: str,
    most: float | None = None,
    least: float | None = None,
) -> Row:
    """Return a row in which what misses its bar is bold.

    Args:
        title: What was measured.
        values: One for each column that has one.
        form: How they are written, for `str.format`.
        most: The bar, if values should not be above it.
        least: The bar, if they should not be below it.
    """
    texts = {}
    for column, value in values.items():
        missed = value > (most or inf) or value < (least or -inf)
        text = form.format(value)
        texts[column] = f"**{text}**" if missed else text
    bar = f"≤ {most:g}" if most else f"≥ {least:g}" if least else ""
    return Row(title, texts, bar)


def with_bar(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that are held to a bar, and those on the same."""
    return [row for row in rows if row.bar or row.title.startswith("the same,")]


def render(rows: Iterable[Row], columns: Sequence[str], note: str) -> str:
    """Return the table in Markdown, and a note below it.

    Args:
        rows: Its lines.
        columns: The columns between title and bar, in order.
        note: How it was measured.
    """
    lines = [
        f"| | {' | '.join(columns)} | bar |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    for title, texts, bar in rows:
        cells = " | ".join(texts.get(column, "") for column in columns)
        lines.append(f"| {title} | {cells} | {bar} |")
    return "\n".join([*lines, "", note, ""])
