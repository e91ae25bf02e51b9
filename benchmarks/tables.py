"""Write README's tables from the files in ``benchmarks/results``.

python benchmarks/tables.py           # write
python benchmarks/tables.py --check   # fail if README is stale
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Run = dict[str, Any]
ROWS: list[tuple[str, Callable[[Run], float], Callable[[float], str]]] = [
    ("accuracy before", lambda run: 100 * run["before"], lambda x: f"{x:.1f} %"),
    ("accuracy after", lambda run: 100 * run["after"], lambda x: f"{x:.1f} %"),
    (
        "trained entries of the base model, or of LoRA",
        lambda run: run["adapter_parameters"],
        lambda x: f"{x:,.0f}",
    ),
    ("seconds to select", lambda run: run["selection_seconds"], lambda x: f"{x:.1f}"),
    ("seconds to train", lambda run: run["training_seconds"], lambda x: f"{x:.1f}"),
    (
        "peak memory of the process, MiB",
        lambda run: run["peak_bytes"] / 2**20,
        lambda x: f"{x:,.0f}",
    ),
    (
        "adapter file, KiB",
        lambda run: run["adapter_bytes"] / 2**10,
        lambda x: f"{x:,.0f}",
    ),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or compare them with what README has.

    Args:
        argv: Arguments of the command line; None for those of this process.

    Returns:
        The exit code: 1 if ``--check`` finds another table.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    fresh = with_table(text, "quickstart", quickstart_table("quickstart"))
    if options.check and fresh != text:
        print("README.md is stale; run `python benchmarks/tables.py`.")
        return 1
    if not options.check:
        readme.write_text(fresh, encoding="utf-8")
    return 0


def with_table(text: str, name: str, table: str) -> str:
    """Put a table between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    replaced, count = re.subn(
        pattern, lambda m: m[1] + table + m[2], text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"README.md needs one table named {name!r}, it has {count}.")
    return replaced


def quickstart_table(name: str) -> str:
    """Return mean and standard deviation over seeds, one column per method."""
    files = sorted(RESULTS.glob(f"{name}-*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    methods = [run["method"] for run in results[0]["runs"]]
    lines = [
        f"| | {' | '.join(methods)} |",
        f"|---|{'---:|' * len(methods)}",
    ]
    for title, value, form in ROWS:
        cells = []
        for method in methods:
            runs = [
                r for each in results for r in each["runs"] if r["method"] == method
            ]
            cells.append(mean_and_spread([value(run) for run in runs], form))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    first = results[0]
    versions = ", ".join(
        f"{library} {first['versions'][library].partition('+')[0]}"
        for library in ("torch", "peft", "transformers")
    )
    note = (
        f"Mean ± standard deviation over {len(results)} seeds, "
        f"{first['machine']['cores']} CPU cores, {versions}; "
        f"files in `benchmarks/results/{name}-*.json`."
    )
    return "\n".join([*lines, "", note, ""])


def mean_and_spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Return ``mean ± sd``, or the value alone where it does not vary."""
    mean = form(statistics.mean(values))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {form(statistics.stdev(values)).removesuffix(' %')}"


if __name__ == "__main__":
    sys.exit(main())
