"""Draw README's figures from the files in ``benchmarks/results``.

python benchmarks/plots.py            # draw those that are stale; --all draws all
python benchmarks/plots.py --check    # fail if one is stale

Each PNG carries a digest of the results and of the code that it was drawn from. It is
stale if they have changed since; which matplotlib drew it does not matter. To add a
figure, write a module with ``draw(*results) -> Figure`` and a line in `PICTURES`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import alignment_plot
import glue_budget
import glue_density
import glue_runs
import glue_table
import quickstart_plot
import step_plot
import style
import titles
from PIL import Image
from record import RESULTS

KEY = "Drawn from"


@dataclass(frozen=True)
class Picture:
    """A figure of the README.

    Args:
        name: Name of the PNG, without the ending.
        results: Names of the JSON files that it shows, without the ending; of a
            folder with "/*", for the list of all that is in it.
        code: What draws it: ``draw`` of the first module takes the content of each of
            ``results`` and returns a matplotlib figure.
    """

    name: str
    results: tuple[str, ...]
    code: tuple[ModuleType, ...]

    def content(self, folder: Path) -> list[Any]:
        """Read what is drawn."""
        return [
            [read(file) for file in sorted(folder.glob(f"{name}.json"))]
            if name.endswith("/*")
            else read(folder / f"{name}.json")
            for name in self.results
        ]

    def digest(self, folder: Path) -> str:
        """Return a hash of what is drawn and of the code that draws it."""
        digest = hashlib.sha256(json.dumps(self.content(folder)).encode())
        for module in self.code:
            digest.update(Path(str(module.__file__)).read_bytes())
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
        figure = self.code[0].draw(*self.content(folder))
        marked = {KEY: self.digest(folder)}
        figure.savefig(folder / f"{self.name}.png", dpi=150, metadata=marked)


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


GLUE = (glue_table, glue_runs)
PICTURES = (
    Picture("glue-budget", ("glue/minilm/*",), (glue_budget, *GLUE)),
    Picture("glue-density", ("glue/minilm/*",), (glue_density, *GLUE)),
    Picture("quickstart", ("quickstart-0", "quickstart-random-0"), (quickstart_plot,)),
    Picture("sample-alignment", ("sample-alignment",), (alignment_plot, style)),
    Picture("step", ("step",), (step_plot, style, titles)),
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
