"""The table of what `selection_speed.py` measured."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from bars import Row, rated, render
from peers import PEERS

CHECK_LENGTH = "64"
LONGEST = 128  # tokens of mixed lengths
PLAIN_BARS = {"16": 1.35, "32": 1.35, "64": 1.10, "128": 1.10}
LOOP_BARS = {"16": 3.0, "mixed": 1.5}
PEER_BAR = 1.7
ERROR_BARS = {"float32": 1e-5, "float64": 1e-12}

Record = dict[str, Any]


def table(results: Record) -> str:
    """Render the ratios and their bars, one column per shape, in Markdown.

    Args:
        results: The content of a result file; parts that were not run are left out.
    """
    return render(rows(results), results["settings"]["shapes"], note(results))


def rows(results: Record) -> list[Row]:
    """Return what each part of the measurements comes to."""
    return [row for part in PARTS for row in part(results)]


def note(results: Record) -> str:
    """Return how it was measured."""
    libraries = ", ".join(
        f"{name} {results['versions'][name]}" for name in ("torch", "transformers")
    )
    return (
        f"Medians of {results['settings']['repeats']} repetitions (memory and errors: "
        f"of one, `torch.topk`: of five), random weights, "
        f"{results['threads']} of {results['machine']['cores']} CPU cores, "
        f"{libraries}."
    )


def _plain_rows(results: Record) -> Iterator[Row]:
    for length, cells in _by_length(results, "plain"):
        values = {c["shape"]: 1 / c["over_engine"]["plain"] for c in cells}
        title = f"time, in plain passes, {_tokens(length)}"
        yield rated(title, values, "{:.2f}", most=PLAIN_BARS.get(length))


def _loop_rows(results: Record) -> Iterator[Row]:
    for length, cells in _by_length(results, "loop"):
        values = {c["shape"]: c["over_engine"]["loop"] for c in cells}
        padded = f", padded to {LONGEST}" if length == "mixed" else ""
        title = f"times faster than a one-sample loop, {_tokens(length)}{padded}"
        yield rated(title, values, "{:.2f}", least=LOOP_BARS.get(length))
    for length, cells in _by_length(results, "unpadded"):
        values = {c["shape"]: c["over_engine"]["unpadded"] for c in cells}
        title = f"the same, {_tokens(length)}, not padded"
        yield rated(title, values, "{:.2f}")


def _check_rows(results: Record) -> Iterator[Row]:
    for length, cells in _by_length(results, "plain"):
        if length == CHECK_LENGTH:
            values = {
                c["shape"]: c["samples"] * median(c["check"]) / c["median"]["plain"]
                for c in cells
            }
            where = f"in samples of a plain pass, {_tokens(length)}"
            yield rated(f"check, once per selection, {where}", values, "{:.1f}")


def _by_length(results: Record, other: str) -> Iterator[tuple[str, list[Record]]]:
    """Yield lengths and the cells in which the engine was timed against another."""
    cells = [c for c in results.get("speed", ()) if other in c["over_engine"]]
    for length in dict.fromkeys(c["length"] for c in cells):
        yield length, [c for c in cells if c["length"] == length]


def _peer_rows(results: Record) -> Iterator[Row]:
    cells = results.get("peers", {}).get("cells", ())
    for name, peer in PEERS.items():
        for scope in peer.scopes:
            alike = [c for c in cells if c["scope"] == scope and name in c["seconds"]]
            values = {c["shape"]: c["over_engine"][name] for c in alike}
            if values:
                layers = "linear layers" if scope == "linear" else "all entries"
                where = f"{layers}, {_tokens(alike[0]['length'])}"
                title = f"times faster than {peer.title}, {where}"
                yield rated(title, values, "{:.2f}", least=PEER_BAR)


def _memory_rows(results: Record) -> Iterator[Row]:
    if found := results.get("memory"):
        shape = found["shape"]
        title = "peak memory beyond a plain pass's, in float32 copies of the entries"
        values = {shape: found["engine"]["beyond_plain"]}
        yield rated(title, values, "{:.2f}", most=1.0)
        values = {shape: found["limited"]["beyond_plain"]}
        yield rated(f"{title}, `memory_limit` of one", values, "{:.2f}", most=1.0)
        values = {shape: found["limited_over_plain"]}
        yield rated("time with that limit, in plain passes", values, "{:.2f}")


def _error_rows(results: Record) -> Iterator[Row]:
    found = results.get("accuracy", {})
    for dtype, bar in ERROR_BARS.items():
        if dtype in found:
            values = {found["shape"]: found[dtype]["of_max"]}
            title = f"largest error over the largest entry, {dtype}"
            yield rated(title, values, "{:.0e}", most=bar)


def _tokens(length: str) -> str:
    if length == "mixed":
        return f"T = {LONGEST // 4} to {LONGEST}"
    return f"T = {length}"


PARTS = (_plain_rows, _loop_rows, _check_rows, _peer_rows, _memory_rows, _error_rows)
