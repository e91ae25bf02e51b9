"""Draw the figures of both READMEs from the files in ``benchmarks/results``.

python benchmarks/plots.py            # draw those that are stale; --all draws all
python benchmarks/plots.py --check    # fail if one is stale

Each PNG carries a digest of the results and of the code that it was drawn from. It is
stale if they have changed since; which matplotlib drew it does not matter. To add a
figure, write a function of the results that returns it and a line in `PICTURES`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import alignment_plot
import experiment
import glue_budget
import glue_density
import glue_table
import quickstart_plot
import search_study
import step_plot
import style
import titles
from matplotlib.figure import Figure
from PIL import Image
from record import RESULTS

from peft_ird.search import drawing, plot_search
from peft_ird.selection import places

KEY = "Drawn from"


@dataclass(frozen=True)
class Picture:
    """A figure of one of the READMEs.

    Args:
        name: Name of the PNG, without the ending.
        results: Names of the JSON files that it shows, without the ending; one with
            "*" or "[...]" stands for the list of all that it matches.
        drawn: Takes the content of each of ``results`` and returns the figure.
        code: The modules that it needs beside its own.
        lists: Names of the lists of experiments that say what is shown.
    """

    name: str
    results: tuple[str, ...]
    drawn: Callable[..., Figure]
    code: tuple[ModuleType, ...] = ()
    lists: tuple[str, ...] = ()

    def content(self, folder: Path) -> list[Any]:
        """Read what is drawn."""
        return [
            [read(file) for file in sorted(folder.glob(f"{name}.json"))]
            if set(name) & set("*[")
            else read(folder / f"{name}.json")
            for name in self.results
        ]

    def digest(self, folder: Path) -> str:
        """Return a hash of what is drawn and of the code that draws it."""
        digest = hashlib.sha256(json.dumps(self.content(folder)).encode())
        modules = (sys.modules[self.drawn.__module__], *self.code)
        paths = [Path(str(module.__file__)) for module in modules]
        paths += [experiment.EXPERIMENTS / f"{name}.toml" for name in self.lists]
        for path in paths:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def is_fresh(self, folder: Path) -> bool:
        """Tell whether the PNG was drawn from these results by this code."""
        path = folder / f"{self.name}.png"
        if not path.exists():
            return False
        with Image.open(path) as image:
            return bool(image.info.get(KEY) == self.digest(folder))

    def draw(self, folder: Path) -> None:
        """Write the PNG."""
        figure = self.drawn(*self.content(folder))
        marked = {KEY: self.digest(folder)}
        figure.savefig(folder / f"{self.name}.png", dpi=150, metadata=marked)


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


GLUE = (glue_table, experiment)
MINILM = ("glue/minilm/*",)
SEARCH = (plot_search, drawing)
PICTURES = (
    Picture("glue-budget", MINILM, glue_budget.draw, GLUE, ("minilm",)),
    Picture("glue-density", MINILM, glue_density.draw, GLUE, ("minilm",)),
    Picture(
        "quickstart",
        ("quickstart-[0-9]", "quickstart-largest-*", "quickstart-random-*"),
        quickstart_plot.draw,
        (style, places),
    ),
    Picture("sample-alignment", ("sample-alignment",), alignment_plot.draw, (style,)),
    Picture("search", ("search-sst2",), search_study.draw_staircases, SEARCH),
    Picture("search-reverse", ("search-sst2",), search_study.draw_contrast, SEARCH),
    Picture("step", ("step",), step_plot.draw, (style, titles)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what is stale, or only name it.

    Args:
        argv: Arguments of the command line; None for those of this process.

    Returns:
        The exit code: 1 if ``--check`` finds a stale figure.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--check", action="store_true", help="only compare")
    add("--all", action="store_true", help="draw what is not stale, too")
    add("--results", type=Path, default=RESULTS, help="folder of results and figures")
    options = parser.parse_args(argv)
    wanted = [p for p in PICTURES if options.all or not p.is_fresh(options.results)]
    for picture in wanted:
        if options.check:
            print(f"{picture.name}.png is stale; run `python benchmarks/plots.py`.")
        else:
            picture.draw(options.results)
            print(f"{picture.name}.png is drawn")
    return int(options.check and bool(wanted))


if __name__ == "__main__":
    sys.exit(main())
