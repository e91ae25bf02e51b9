"""Write the tables of both READMEs from the files in ``benchmarks/results``.

python benchmarks/tables.py           # write
python benchmarks/tables.py --check   # fail if one is stale
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import file_size
import glue_density
import glue_table
import option_study
import search_study
import selection_large
import selection_stairs
import speed_table
import step_table
import topk
from bars import Row, rated, render, with_bar
from experiment import Experiment, load_results
from record import RESULTS, ROOT

Run = dict[str, Any]
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
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
    """Write the tables, or compare them with what the documents have.

    Args:
        argv: Arguments of the command line; None for those of this process.

    Returns:
        The exit code: 1 if ``--check`` finds another table.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args(argv)
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    fresh = {path: with_tables(text) for path, text in texts.items()}
    stale = [path for path in DOCUMENTS if fresh[path] != texts[path]]
    for path in stale:
        if options.check:
            print(
                f"{path.relative_to(ROOT)} is stale; run `python benchmarks/tables.py`."
            )
        else:
            path.write_text(fresh[path], encoding="utf-8")
            print(f"{path.relative_to(ROOT)} is written")
    return int(options.check and bool(stale))


def with_tables(text: str) -> str:
    """Put each table between its ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: If there is no table of a name.
    """

    def fill(match: re.Match[str]) -> str:
        if (make := TABLES.get(match["name"])) is None:
            raise ValueError(
                f"No table is named {match['name']!r}; there are {', '.join(TABLES)}."
            )
        return match["start"] + make() + match["end"]

    pattern = r"(?P<start><!-- table: (?P<name>\S+) -->\n).*?(?P<end><!-- end -->)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def quickstart_table() -> str:
    """Return mean and standard deviation over seeds, one column per method.

    Seconds and memory are the quickstart's own, whose two runs are side by side.
    """
    plain, largest, random = (
        load(f"quickstart{which}") for which in ("", "-largest", "-random")
    )
    columns = {
        "IRD, drawn, t = 4": (plain, "IRD", "ird_lr"),
        "LoRA": (plain, "LoRA", "lora_lr"),
        "random mask": (random, "RANDOM", "ird_lr"),
        "IRD, largest": (largest, "IRD", "ird_lr"),
    }
    rates = [each[0]["options"][rate] for each, _, rate in columns.values()]
    lines = [
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        f"| learning rate | {' | '.join(f'{rate:g}' for rate in rates)} |",
    ]
    for title, value, form in ROWS:
        cells = [
            mean_and_spread([value(run) for run in select(results, method)], form)
            if results is plain or not title.startswith(("seconds", "peak"))
            else ""
            for results, method, _ in columns.values()
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    first = plain[0]
    versions = ", ".join(
        f"{library} {first['versions'][library].partition('+')[0]}"
        for library in ("torch", "peft", "transformers")
    )
    note = (
        f"Mean ± standard deviation over {len(plain)} seeds, "
        f"{first['machine']['cores']} CPU cores, {versions}; "
        "files in `benchmarks/results`."
    )
    return "\n".join([*lines, "", note, ""])


def selection_table() -> str:
    """Return what a selection costs beside a plain pass, a loop and other libraries."""
    return selections(lambda rows: rows)


def selection_bars() -> str:
    """Return those of these rows that are held to a bar."""
    return selections(with_bar)


def selections(chosen: Callable[[list[Row]], list[Row]]) -> str:
    """Return a table of rows on selection, of those on top-k in the last column."""
    speed, stairs, largest = (
        read(name) for name in ("selection-speed", "selection-stairs", "topk")
    )
    shapes = speed["settings"]["shapes"]
    rows = [
        *speed_table.rows(speed),
        *selection_stairs.rows(stairs),
        *topk_rows(largest, shapes[-1]),
    ]
    return render(chosen(rows), shapes, speed_table.note(speed))


def topk_rows(results: Run, column: str) -> list[Row]:
    """Return the rows on top-k; they are of no model, so they stand in one column."""
    found = []
    for row in results["rows"]:
        where = f"{results['entries'] / 1e6:.0f} M scores, k = {row['density']:.1%}"
        ratio, size = row["ratio"], row["bytes_per_entry"]["stream"]
        title = f"times faster than `torch.topk` on the concatenation, {where}"
        found.append(rated(title, {column: ratio}, "{:.1f}", least=topk.SPEED_BAR))
        title = f"bytes per entry extra, {where}"
        found.append(rated(title, {column: size}, "{:.2f}", most=topk.MEMORY_BAR))
    return found


def steps_table() -> str:
    """Return what a training step costs; the densities at the ends ran by themselves.

    ``step.py --densities 0.0002 0.025 --parts speed --only floor ird ird-random lora-8
    shira supertuning full --output benchmarks/results/step-densities.json``
    """
    results = step_table.joined(read("step"), read("step-densities"))
    return step_table.table(results)


def step_bars() -> str:
    """Return what is held to a bar, at the densities of one run."""
    results = read("step")
    rows = with_bar(step_table.rows(results))
    return render(rows, results["settings"]["shapes"], step_table.note(results))


def large_selections_table() -> str:
    """Return what selecting costs on a GPU."""
    return selection_large.table(read("selection-large-gpu"))


def gpu_steps_table() -> str:
    """Return what a training step costs on a GPU."""
    return step_table.table(read("step-gpu"))


def options_table() -> str:
    """Return what options of the selection are worth on real data."""
    return option_study.table(read("option-study"))


def files_table() -> str:
    """Return the table of bytes per entry."""
    return file_size.table(read("file-size"))


def glue_scores() -> str:
    """Return the scores of all methods on GLUE at 0.1 %."""
    return scores_on("minilm", "MiniLM")


def glue_densities() -> str:
    """Return the scores of some methods on GLUE at several densities."""
    return glue_density.table(load_results("minilm"))


def head_scores() -> str:
    """Return the scores where the head has one rate in all rows."""
    return scores_on("minilm-head", "MiniLM")


def llama_scores() -> str:
    """Return the scores on the LLaMA-type model."""
    return scores_on("smollm", "The first six blocks of SmolLM2-135M-Instruct")


def llama_head_scores() -> str:
    """Return the same where the head has one rate in all rows."""
    return scores_on("smollm-head", "The same model")


def scores_on(name: str, label: str) -> str:
    """Return the scores of a list of experiments."""
    constants = read("glue-constants")["scores"]
    return glue_table.score_table(Experiment.load(name), 0.001, label, constants)


def glue_differences() -> str:
    """Return what IRD and its variants gain over the others."""
    experiment = Experiment.load("minilm")
    ours = ["IRD", "IRD, drawn", "IRD, drawn, t = 4", "random mask"]
    loras = ["LoRA, equal budget", "LoRA, all linear layers, r = 1"]
    others = ["IRD", "FISH Mask", "random mask", *loras]
    return glue_table.difference_table(experiment, 0.001, ours, others)


def head_differences() -> str:
    """Return the same where the head has one rate in all rows."""
    experiment = Experiment.load("minilm-head")
    ours = ["IRD, drawn, t = 4", "random mask", "LoRA, equal budget"]
    others = ["IRD", "FISH Mask", "random mask", "LoRA, equal budget"]
    return glue_table.difference_table(experiment, 0.001, ours, others)


def search_table() -> str:
    """Return the cells of the paper's staircase."""
    return search_study.table(read("search-sst2"))


TABLES = {
    "glue": glue_scores,
    "glue-differences": glue_differences,
    "glue-head": head_scores,
    "glue-head-differences": head_differences,
    "glue-density": glue_densities,
    "glue-llama": llama_scores,
    "glue-llama-head": llama_head_scores,
    "search": search_table,
    "quickstart": quickstart_table,
    "selection": selection_table,
    "selection-bars": selection_bars,
    "selection-large": large_selections_table,
    "step": steps_table,
    "step-bars": step_bars,
    "step-gpu": gpu_steps_table,
    "options": options_table,
    "files": files_table,
}


def read(name: str) -> dict[str, Any]:
    """Read one result file.

    Args:
        name: Its name without the ending.
    """
    content = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(content)
    return found


def load(name: str) -> list[dict[str, Any]]:
    """Read the result files of a name, one per seed.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they were run with different options.
    """
    files = [p for p in RESULTS.glob("*.json") if re.fullmatch(rf"{name}-\d+", p.stem)]
    if not files:
        raise FileNotFoundError(
            f"No results named '{name}' in {RESULTS.name}; run benchmarks/run.py."
        )
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(files)]
    for path, result in zip(sorted(files), found, strict=True):
        first, these = found[0]["options"], result["options"]
        names = sorted({*first, *these} - {"data_dir", "output_dir", "seed"})
        if differing := [n for n in names if first.get(n) != these.get(n)]:
            raise ValueError(
                f"{path.name} was run with another {', '.join(differing)} than the "
                f"first seed of '{name}'. Delete it, or give it another `--name`."
            )
    return found


def select(results: Sequence[dict[str, Any]], method: str) -> list[Run]:
    """Return the runs of one method, one per seed."""
    return [run for each in results for run in each["runs"] if run["method"] == method]


def mean_and_spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Return ``mean ± sd``, or the value alone where it does not vary."""
    mean = form(statistics.mean(values))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {form(statistics.stdev(values)).removesuffix(' %')}"


if __name__ == "__main__":
    sys.exit(main())
