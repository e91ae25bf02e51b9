"""Fine-tune a classifier on a GLUE task by one method, and score it.

Models of the BERT, GPT-2 and LLaMA kinds (decoders read a prompt), every method of the
paper's Table 2, data from the hub or from local files:

    python examples/run_glue.py --task rte --method ird
    python examples/run_glue.py --task rte --method lora --data-dir GLUE --model PATH
    accelerate launch examples/run_glue.py --task mnli --method ird --model gpt2
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from arguments import amount, json_object, natural, positive, share
from glue import GLUE
from glue_setup import Setup
from methods import (
    IRD_METHODS,
    METHODS,
    OWN_SIZE,
    RATES,
    SET_BY_PLAN,
    Built,
    Plan,
    base_size,
    built,
)
from metrics import SCORES
from report import peak_memory
from tasks import packaged_minilm
from torch import nn
from transformers import set_seed

from peft_ird import Calibration, IRDConfig, Selection


def main(argv: Sequence[str] | None = None) -> None:
    """Run once and write ``results.json``.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    options = parse_arguments(argv)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = run(options, folder)
    if is_first_process():
        text = json.dumps(results, indent=2)
        (folder / "results.json").write_text(text, encoding="utf-8")
        print(text)


def is_first_process() -> bool:
    """Return whether this is the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # scripts that pass options on look for whole names
    )
    add = parser.add_argument
    add("--task", choices=[*GLUE], required=True)
    add("--method", choices=[*METHODS], default="ird")
    add("--model", help="folder or hub name; None for the packaged MiniLM")
    add("--data-dir", help="folder with TASK/SPLIT.parquet; None for the hub")
    add("--output-dir", default="glue-output", help="for results and adapter")
    add("--density", type=share, default=0.001, help="of the model without its head; "
        f"only recorded for {', '.join(OWN_SIZE)}, which have a size of their own",
    )  # fmt: skip
    add("--budget", type=positive, help="entries to train, instead of --density")
    add("--rank", type=positive, help="of LoRA; None for the one that fits the budget")
    add("--options", type=json_object, default={}, help="of IRDConfig, as JSON")
    add("--lr", type=amount, help="learning rate, of the head as well; None: one that "
        "suits the method on MiniLM")  # fmt: skip
    add("--head-lr", type=amount, help="learning rate of the head; None: that of --lr, "
        "too low for LoRA's on MiniLM (0.03 there, with --lr 0.003)")  # fmt: skip
    add("--epochs", type=amount, default=3.0)
    add("--batch-size", type=positive, default=32, help="of each process")
    add("--max-length", type=positive, help="tokens; None for the task's")
    add("--max-train", type=positive, help="training samples, drawn by the seed; None: "
        "all")  # fmt: skip
    add("--held-out", type=natural, default=500, help="training samples only scored")
    add("--seed", type=int, default=0, help="of data, head, order and selection")
    add("--threads", type=positive, help="threads of the CPU")
    add("--precision", choices=["highest", "high", "medium"], default="highest",
        help="of float32 matrix products, as in torch.set_float32_matmul_precision",
    )  # fmt: skip
    add("--save", action="store_true", help="keep the adapter, or the whole model")
    options = parser.parse_args(argv)
    if options.rank and not options.method.startswith("lora"):
        parser.error(f"--rank is for LoRA, not for --method {options.method}")
    if options.rank and options.budget:
        parser.error("pass --rank or --budget, not both: one follows from the other")
    if options.budget and options.method in OWN_SIZE:
        parser.error(f"--budget is not for --method {options.method}: it has its own")
    if options.head_lr is not None and options.method == "diff_pruning":
        parser.error("--head-lr is not for Diff Pruning, which trains twice")
    if options.options:
        check_options(parser, options.method, options.options)
    options.model = options.model or packaged_minilm()
    if options.lr is None:
        options.lr = RATES[options.method]
    return options


def check_options(
    parser: argparse.ArgumentParser, method: str, given: dict[str, Any]
) -> None:
    """Refuse options that the method does not have, or that have arguments."""
    if method not in IRD_METHODS:
        parser.error(f"--options is for {', '.join(IRD_METHODS)}, not for {method}")
    known = {field.name for field in fields(IRDConfig)} - {*SET_BY_PLAN, "density"}
    if unknown := given.keys() - known:
        parser.error(
            f"{', '.join(sorted(unknown))}: not among the options of IRDConfig, or set "
            "by other arguments"
        )


def run(options: argparse.Namespace, folder: Path | None = None) -> dict[str, Any]:
    """Select, train and score once.

    Args:
        options: What `parse_arguments` returns.
        folder: Where the adapter goes, or the model without one, with ``--save``.

    Returns:
        Scores, sizes, seconds, and where the selected entries lie; all for JSON.
    """
    setup = Setup(options)
    model = setup.load_model()
    budget = options.budget or max(1, round(options.density * base_size(model)))
    # The processes of `accelerate launch` are known, and the model is on its device.
    model.to(setup.arguments().device)
    plan = Plan(
        budget=budget,
        calibration=Calibration(setup.train, setup.collate),
        seed=options.seed,
        fit=lambda fitted, groups=None: setup.trainer(fitted, groups).train(),
        options=options.options,
        rank=options.rank,
    )
    start = time.perf_counter()
    made = built(options.method, model, plan)
    selected = time.perf_counter()
    set_seed(options.seed)
    trainer = setup.trainer(made.model, rate_groups(made.model, options))
    trainer.train()
    trained = time.perf_counter()
    scores = setup.scores(trainer)
    return {
        "task": options.task,
        "method": options.method,
        "options": options.options,
        "rank": options.rank,
        "budget": budget,
        **trained_sizes(made.model),
        "rate": options.lr,
        "head_rate": options.lr if options.head_lr is None else options.head_lr,
        "seed": options.seed,
        "train": len(setup.train),
        "epochs": options.epochs,
        "metric": SCORES.get(options.task, "accuracy"),
        "scores": scores,
        "seconds": {
            "select": selected - start,
            "train": trained - selected,
            "evaluate": time.perf_counter() - trained,
        },
        "peak_bytes": peak_memory(),
        "adapter_bytes": saved_bytes(made.model, folder if options.save else None),
        "selection": selection_facts(made),
    }


def rate_groups(
    model: nn.Module, options: argparse.Namespace
) -> list[dict[str, Any]] | None:
    """Return groups for the optimizer, if the head has a rate of its own."""
    if options.head_lr is None:
        return None
    in_head, others = trained_parts(model)
    return [{"params": in_head, "lr": options.head_lr}, {"params": others}]


def trained_parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that are trained, those of the head and the others."""
    heads = ("modules_to_save", "classifier.", "score.")
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[not any(head in name for head in heads)].append(parameter)
    return parts


def trained_sizes(model: nn.Module) -> dict[str, int]:
    """Return how many entries are trained, in the head and elsewhere."""
    in_head, others = (sum(p.numel() for p in part) for part in trained_parts(model))
    return {"entries": others, "head_entries": in_head}


def saved_bytes(model: nn.Module, folder: Path | None) -> int | None:
    """Return the size of the adapter's weight file; None for a model without one.

    The first process writes to the folder, if there is one; a model without an adapter
    is saved whole.
    """
    place = folder if is_first_process() else None
    if not hasattr(model, "peft_config"):
        if place:
            model.save_pretrained(str(place / "model"))
        return None
    with tempfile.TemporaryDirectory() as temporary:
        target = place / "adapter" if place else Path(temporary)
        model.save_pretrained(str(target))
        return (target / "adapter_model.safetensors").stat().st_size


def selection_facts(made: Built) -> dict[str, Any] | None:
    """Return where the budget went, and the stages that led there."""
    selection: Selection | None = made.selection
    if selection is None:
        return None
    return {
        "stages": [list(stage) for stage in selection.stages],
        "samples": list(selection.samples)[:128],
        **{
            by: {
                name: [place.entries, round(place.share, 4)]
                for name, place in selection.places(by).items()
            }
            for by in ("kind", "layer")
        },
    }


if __name__ == "__main__":
    main()
