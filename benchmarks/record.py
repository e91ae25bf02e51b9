"""What each benchmark records beside its figures, and how a result file is written."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# glibc's: nothing is mapped by itself, and nothing that is freed is given back.
KEEPING = dict.fromkeys(
    ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1" + 12 * "0"
)


def keep_memory() -> None:
    """Start this process anew, with an allocator that keeps what is freed.

    Otherwise memory goes back to the system during each pass and comes again page by
    page, a tenth or a third of the time, and it depends on the order of the contestants
    who pays for that.
    """
    if not KEEPING.items() <= os.environ.items():
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | KEEPING)


@contextmanager
def giving_back() -> Iterator[None]:
    """Let processes that start inside have an allocator as it is by default."""
    kept = {name: os.environ.pop(name) for name in KEEPING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on, beside the code that is timed.

    Args:
        options: Those of the script; its device is among them, unless it has none.
    """
    return {
        "settings": {k: v for k, v in vars(options).items() if k != "output"},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": machine(getattr(options, "device", "cpu")),
        "git": git_state(),
    }


def result_file(name: str, options: argparse.Namespace) -> Path:
    """Return where a result goes: what was asked for, else a file for the device."""
    given: Path | None = options.output
    return given or RESULTS / f"{name}{'-gpu' * (options.device != 'cpu')}.json"


@cache
def git_state() -> dict[str, Any]:
    """Return the commit at the start, and whether files that run differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    code = ("--", "*.py", "*.toml", "*.cfg", "*.txt")
    changed = git("status", "--porcelain", "--untracked-files=no", *code)
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what the figures depend on.

    Args:
        device: Where it is measured.
    """
    on_gpu = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def now(device: str) -> float:
    """Return the time when a device is through with its work, in seconds."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def status(field: str) -> int:
    """Return what Linux says of this process's memory, in bytes.

    Args:
        field: ``"VmRSS"``, resident now, or ``"VmHWM"``, at the peak.
    """
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)[field]
    return 1024 * int(found.split()[0])


def write(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Return the versions of what runs, without the suffix of the build (+cpu)."""
    packages = ("peft_ird", "peft", "torch", "transformers")
    return {name: version(name).partition("+")[0] for name in packages}


with suppress(OSError, subprocess.CalledProcessError):
    git_state()  # what this process runs; there may be commits before it ends
