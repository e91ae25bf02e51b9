"""What each benchmark records beside its figures, and how a result file is written."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def git_state() -> dict[str, Any]:
    """Return the commit, and whether files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def write(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Return the versions of what runs, without the suffix of the build (+cpu)."""
    packages = ("peft_ird", "peft", "torch", "transformers")
    return {name: version(name).partition("+")[0] for name in packages}
