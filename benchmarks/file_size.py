"""Measure bytes per trained entry of saved adapters, beside PEFT's own sparse tuners.

python benchmarks/file_size.py

Models have random weights and no head; the whole weight file counts, with its table of
names. "clustered" masks are those of scores as Fisher information has them: large where
a row, a column and a module are large.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, ShiraConfig, get_peft_model
from peft.tuners.supertuning import SupertuningConfig
from record import RESULTS, git_state, machine, versions, write
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from peft_ird import IRDConfig, Selection

SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 128, "vocab_size": 100},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
               "intermediate_size": 1536},
    "bert-base": {},
}  # fmt: skip
DENSITIES = (0.0002, 0.001, 0.005, 0.025)
TYPES = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Save every adapter once and write the sizes down.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["minilm", "bert-base"])
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--output", type=Path, default=RESULTS / "file-size.json")
    options = parser.parse_args(argv)
    rows = [
        row
        for name in options.models
        for density in options.densities
        for row in measure(name, density)
    ]
    facts = {"git": git_state(), "machine": machine(), "versions": versions()}
    write(options.output, {"rows": rows, **facts})


def measure(name: str, density: float) -> list[dict[str, Any]]:
    """Return one row for each file: ours of both masks and types, and theirs."""
    rows = []
    masks: dict[str, Callable[[nn.Module, float], Selection]] = {
        "random": random_mask,
        "clustered": clustered_mask,
    }
    for mask, make in masks.items():
        for dtype in TYPES:
            model = make_model(name)
            config = IRDConfig(selection=make(model, density), save_dtype=dtype)
            rows.append({"method": "IRD", "mask": mask, **saved(model, config)})
    rows.append({"method": "SHiRA", **saved(make_model(name), shira(name, density))})
    config = SupertuningConfig(sparsity=1 - density, target_modules="all-linear")
    rows.append({"method": "Super-Tuning", **saved(make_model(name), config)})
    for row in rows:
        row.update(model=name, density=density)
        print(row)
    return rows


def make_model(name: str) -> nn.Module:
    """Build a model without a checkpoint."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES[name]))


def shira(name: str, density: float) -> PeftConfig:
    """Return the configuration with the nearest number of entries: its rank's."""
    linear = [m for m in make_model(name).modules() if isinstance(m, nn.Linear)]
    wanted = density * sum(m.weight.numel() for m in linear)
    step = sum(m.in_features + m.out_features for m in linear)
    return ShiraConfig(
        r=max(1, round(wanted / step)), random_seed=0, target_modules="all-linear"
    )


def random_mask(model: nn.Module, density: float) -> Selection:
    """Choose entries of all linear layers alike."""
    scores = {name: torch.rand(p.shape) for name, p in parameters(model).items()}
    return best(scores, density)


def clustered_mask(model: nn.Module, density: float) -> Selection:
    """Choose entries where rows, columns and modules are large."""

    def factor(size: int) -> Tensor:
        return torch.randn(size).mul(1.5).exp()

    scores = {}
    for name, parameter in parameters(model).items():
        score = torch.randn(parameter.shape).exp() * factor(1)
        for axis, size in enumerate(parameter.shape):
            shape = [size if i == axis else 1 for i in range(parameter.ndim)]
            score *= factor(size).view(shape)
        scores[name] = score
    return best(scores, density)


def parameters(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Return the parameters of the linear layers by module and name."""
    return {
        (module_name, name): parameter
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters()
    }


def best(scores: dict[tuple[str, str], Tensor], density: float) -> Selection:
    """Return the entries of the largest scores over all parameters."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = flat.topk(round(density * len(flat))).indices.sort().values
    indices: dict[str, dict[str, Tensor]] = {}
    start = 0
    for (module, name), score in scores.items():
        inside = (chosen >= start) & (chosen < start + score.numel())
        if inside.any():
            found = (chosen[inside] - start).int()
            indices.setdefault(module, {})[name] = found
        start += score.numel()
    shapes = {m: {n: tuple(scores[m, n].shape) for n in t} for m, t in indices.items()}
    return Selection(indices=indices, shapes=shapes, method="benchmark")


def saved(model: nn.Module, config: PeftConfig) -> dict[str, Any]:
    """Let PEFT save an adapter, and return its size."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
        settings = Path(folder, "adapter_config.json").stat().st_size
    entries = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {
        "values": getattr(config, "save_dtype", None) or "float32",
        "entries": entries,
        "bytes": size,
        "bytes_per_entry": size / entries,
        "config_bytes": settings,
    }


def table(results: dict[str, Any]) -> str:
    """Return README's table: bytes per entry for each file of the largest model.

    Args:
        results: What `main` wrote.
    """
    name = results["rows"][-1]["model"]
    rows = [row for row in results["rows"] if row["model"] == name]
    densities = sorted({row["density"] for row in rows})
    lines = [
        "| | " + " | ".join(f"{100 * density:g} %" for density in densities) + " |",
        "|---|" + "---:|" * len(densities),
    ]
    found: dict[str, list[str]] = {}
    for row in rows:
        mask = f", {row['mask']} mask" if "mask" in row else ""
        title = f"{row['method']}, {row['values']}{mask}"
        found.setdefault(title, []).append(f"{row['bytes_per_entry']:.2f}")
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in found.items()]
    used = ", ".join(f"{k} {v}" for k, v in results["versions"].items() if k == "peft")
    note = f"{name}, random weights, all linear layers, no head; {used}."
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main()
