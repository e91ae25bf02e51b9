"""Run the quickstart on several seeds and keep one result file per seed.

python benchmarks/run.py --seeds 0 1 2
python benchmarks/run.py --name quickstart-largest --temperature 0 --ird-lr 1e-3
python benchmarks/run.py --name quickstart-random --method random --ird-lr 2e-2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, git_state, machine, write

_LOCAL = ("adapter", "data_dir", "model", "output_dir")  # paths of one machine


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has no result file yet; finished seeds are skipped.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="quickstart", help="of the result files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, passed_on = parser.parse_known_args(argv)
    RESULTS.mkdir(exist_ok=True)
    for seed in options.seeds:
        path = RESULTS / f"{options.name}-{seed}.json"
        if path.exists():
            print(f"{path.name} is there already")
            continue
        with tempfile.TemporaryDirectory() as folder:
            run_quickstart(Path(folder), seed, passed_on)
            found = json.loads(Path(folder, "results.json").read_text("utf-8"))
        write(path, {**without_paths(found), "git": git_state(), "machine": machine()})


def run_quickstart(folder: Path, seed: int, passed_on: Sequence[str]) -> None:
    """Run the example in a process of its own."""
    script = ROOT / "examples" / "quickstart.py"
    command = [sys.executable, str(script), "--output-dir", str(folder)]
    subprocess.run([*command, "--seed", str(seed), *passed_on], check=True)


def without_paths(found: Any) -> Any:
    """Keep the last part of each path; where a machine has it is its own affair."""
    if isinstance(found, list):
        return [without_paths(each) for each in found]
    if not isinstance(found, dict):
        return found
    return {
        name: Path(value).name
        if name in _LOCAL and isinstance(value, str)
        else without_paths(value)
        for name, value in found.items()
    }


if __name__ == "__main__":
    main()
