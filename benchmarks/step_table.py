"""The table of what `step.py` measured."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from bars import Row, rated, render
from titles import TITLES
from trainees import SPARSE, Trainee

FLOOR_BARS = {"ird": 1.08, "ird-random": 1.25}
FLOOR_BARS_UP_TO = 0.005  # density
PEER_BARS = {"lora-8": 0.97, "shira": 0.8, "supertuning": 0.8, "full": 0.72}
PEAK_BAR, KEPT_BAR, SWITCH_BAR, STATE_BAR = 1.0, 0.1, 20.0, 20.0
Record = dict[str, Any]


def table(results: Record) -> str:
    """Render ratios and their bars, one column per shape; misses are bold.

    Args:
        results: The content of a result file; parts that were not run are left out.
    """
    return render(rows(results), results["settings"]["shapes"], note(results))


def rows(results: Record) -> list[Row]:
    """Return what each part of the measurements comes to."""
    return [row for part in PARTS for row in part(results)]


def note(results: Record) -> str:
    """Return how it was measured."""
    versions = results["versions"]
    libraries = ", ".join(f"{n} {versions[n]}" for n in ("torch", "peft"))
    where = (
        results["machine"]["gpu"]
        or f"{results['threads']} of {results['machine']['cores']} CPU cores"
    )
    return (
        f"Medians of {results['settings']['repeats']} repetitions, random weights, "
        f"{results['settings']['dtype']}, no dropout, {where}, {libraries}; "
        f"the slowest repetition of a contestant took {_spread(results):.2f} times as "
        "long as its fastest, in the median."
    )


def _spread(results: Record) -> float:
    """Return how far repetitions of a contestant are apart, in the median of all."""
    steps = [
        row["step"]
        for rows in _speed(results).values()
        for row in rows.values()
        if row.get("step")
    ]
    return median(max(each) / min(each) for each in steps)


def joined(results: Record, more: Record) -> Record:
    """Return results with what another run has of other densities, in their order.

    Ratios are those within each run.

    Args:
        results: The content of a result file.
        more: That of another one.
    """
    others = _speed(more)
    cells = []
    for cell in results["speed"]:
        everyone = {**others.get(cell["shape"], {}), **cell["trainees"]}
        by_density = sorted(everyone.items(), key=lambda pair: pair[1]["density"] or 0)
        cells.append({**cell, "trainees": dict(by_density)})
    return {**results, "speed": cells}


def _floor_rows(results: Record) -> Iterator[Row]:
    for cells in _cells(results, "ird", "ird-random"):
        name, density = (cells[0][1][key] for key in ("name", "density"))
        bar = FLOOR_BARS[name] if density <= FLOOR_BARS_UP_TO else None
        what = f"{TITLES[name]}, {100 * density:g} %"
        values = {
            shape: row["over"]["floor"]["step"]
            for shape, row in cells
            if "floor" in row["over"]
        }
        if values:
            title = f"step, over a frozen model's passes: {what}"
            yield rated(title, values, "{:.2f}", most=bar)


def _peer_rows(results: Record) -> Iterator[Row]:
    for cells in _cells(results, "ird", "ird-random"):
        name, density = (cells[0][1][key] for key in ("name", "density"))
        for other in TITLES if name == "ird" else PEER_BARS:
            if other.startswith(("ird", "floor")):
                continue
            key = other
            if other in SPARSE:
                key = Trainee(other, density).label
            values = {s: r["over"][key]["step"] for s, r in cells if key in r["over"]}
            if values:
                title = (
                    f"step, {TITLES[name]}, {100 * density:g} %, over {TITLES[other]}"
                )
                yield rated(title, values, "{:.2f}", most=PEER_BARS.get(other))


def _kept_rows(results: Record) -> Iterator[Row]:
    for cells in _cells(results, "ird", "ird-random"):
        name, density = (cells[0][1][key] for key in ("name", "density"))
        values = {}
        for shape, row in cells:
            rows = _speed(results)[shape]
            if {"floor", "lora-8"} <= set(row["over"]):
                floor = rows["floor"]["kept"]
                beyond = rows["lora-8"]["kept"] - floor
                values[shape] = (row["kept"] - floor) / max(1, beyond)
        if values:
            title = (
                "kept for backward beyond the frozen model's, over LoRA's (r = 8): "
                f"{TITLES[name]}, {100 * density:g} %"
            )
            bar = KEPT_BAR if name == "ird" else None
            yield rated(title, values, "{:.2f}", most=bar)


def _peak_rows(results: Record) -> Iterator[Row]:
    found = results.get("peak", {})
    rows = found.get("trainees", {})
    lora = rows.get("lora-8", {}).get("beyond")
    for label, row in rows.items():
        if lora and label.startswith("ird") and "beyond" in row:
            values = {found["shape"]: row["beyond"] / lora}
            what = label.replace("ird", TITLES["ird"] + ",", 1)
            title = f"peak memory beyond the model, over LoRA's (r = 8): {what}"
            yield rated(title, values, "{:.2f}", most=PEAK_BAR)


def _switch_rows(results: Record) -> Iterator[Row]:
    if not (found := results.get("switch")):
        return
    merged = median(found["lora-8"]["merged"])
    active = merged / median(found["ird"]["active"])
    title = "times faster to activate another than LoRA (r = 8) unmerges and merges"
    yield rated(title, {found["shape"]: active}, "{:.0f}", least=SWITCH_BAR)
    for title, key in (
        ("the same, merged adapters of both", "times_faster"),
        ("the same, active adapters of both", "times_faster_active"),
    ):
        yield rated(title, {found["shape"]: found[key]}, "{:.1f}")


def _state_rows(results: Record) -> Iterator[Row]:
    for cells in _cells(results, "ird", "ird-random"):
        name, density = (cells[0][1][key] for key in ("name", "density"))
        values = {shape: row["state_bytes"]["all"] for shape, row in cells}
        what = f"{TITLES[name]}, {100 * density:g} %"
        title = f"bytes per entry with Adam, its rows and columns included: {what}"
        yield rated(title, values, "{:.1f}", most=STATE_BAR)


def _speed(results: Record) -> dict[str, dict[str, Record]]:
    return {cell["shape"]: cell["trainees"] for cell in results.get("speed", ())}


def _cells(results: Record, *names: str) -> Iterator[list[tuple[str, Record]]]:
    """Yield the shapes and rows of each contestant of some names that did not fail."""
    found: dict[str, list[tuple[str, Record]]] = {}
    for shape, rows in _speed(results).items():
        for label, row in rows.items():
            if row["name"] in names and "error" not in row:
                found.setdefault(label, []).append((shape, row))
    yield from found.values()


PARTS = (_floor_rows, _peer_rows, _peak_rows, _kept_rows, _switch_rows, _state_rows)
