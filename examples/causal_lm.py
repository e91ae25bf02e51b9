"""Fine-tune a causal language model on text, and export it as a plain model again.

Perplexity of held-out text and a greedy continuation, before and after; the adapter is
saved, reloaded and merged, the merged model loaded without PEFT; and a LoRA with as
many trained parameters is set beside it:

    python examples/causal_lm.py --lora
    python examples/causal_lm.py --model PATH --text FILE --density 0.001

Without ``--model`` a tiny LLaMA learns a small grammar first, and then other words.
"""

import argparse
import json
import math
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import tiny_llama
import torch
import transformers
from arguments import amount, natural, positive, share
from language_report import Run, format_runs
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peft_ird
from peft_ird import Calibration, IRDConfig
from peft_ird.selection.criteria import METHODS
from peft_ird.selection.entries import SCOPES

Block = dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, reload, merge and export; print and write what was found.

    Args:
        argv: Arguments of the command line; None for those of this process.

    Returns:
        What ``results.json`` holds.
    """
    options = parse_arguments(argv)
    warnings.simplefilter("ignore", FutureWarning)  # peft reads renamed attributes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    lesson = Lesson(options)
    runs = []
    budget = None
    if options.lora:
        runs.append(lesson.learn("LoRA", lesson.lora(), options.lora_lr))
        budget = runs[0].parameters
    base = lesson.load_base()
    start = time.perf_counter()
    model = lesson.ird(base, budget)
    seconds = time.perf_counter() - start
    name = options.method.upper()
    runs.insert(0, lesson.learn(name, model, options.lr, seconds))
    results = {
        "options": vars(options),
        "versions": {m.__name__: m.__version__ for m in LIBRARIES},
        "blocks": {"train": len(lesson.train), "held_out": len(lesson.held_out)},
        "runs": [asdict(run) for run in runs],
    }
    path = Path(options.output_dir, "results.json")
    path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(format_runs(runs))
    return results


LIBRARIES = (peft_ird, peft, torch, transformers)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="The learning rates are not tuned, for any method.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="model folder or hub name; None for a tiny LLaMA made here")
    add("--text", help="file with one text per line; None for the built-in one")
    add("--prompt", default="the old", help="what is continued, before and after")
    add("--output-dir", default="causal-lm-output", help="folder for all results")
    add("--method", default="ird", choices=METHODS, help="of IRDConfig")
    add("--density", type=share, default=0.01, help="share of the linear weights")
    add("--scope", default="global", choices=SCOPES, help="of IRDConfig")
    add("--temperature", type=amount, default=0.0, help="0 takes the largest entries; "
        "above, they are drawn within --scope")  # fmt: skip
    add("--num-samples", type=int, default=32, help="blocks that IRD starts from")
    add("--lora", type=positive, nargs="?", const=1, help="rank of a LoRA to train as "
        "well; its number of parameters takes the place of --density")  # fmt: skip
    add("--lr", type=amount, default=5e-3, help="learning rate of IRD")
    add("--lora-lr", type=amount, default=5e-3, help="learning rate of LoRA")
    add("--steps", type=positive, default=150, help="training steps of 16 blocks")
    add("--block", type=positive, default=64, help="tokens in a block")
    add("--base-steps", type=natural, default=300, help="steps of the tiny LLaMA")
    add("--dtype", default="float32", choices=("float32", "bfloat16"),
        help="type of the base weights; a merge into bfloat16 rounds")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of text, order and selection")
    return parser.parse_args(argv)


class Lesson:
    """The text, in blocks without padding, and the model that is to learn it.

    Args:
        options: The options of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.output_dir)
        self.base = options.model or str(self.make_base())
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        texts = tiny_llama.new_text(options.seed)
        if options.text:
            texts = Path(options.text).read_text(encoding="utf-8").splitlines()
        random.Random(options.seed).shuffle(texts)
        cut = len(texts) - max(1, len(texts) // 10)
        self.train = self.blocks(texts[:cut], self.tokenizer)
        self.held_out = self.blocks(texts[cut:], self.tokenizer)
        if options.text and not options.model:
            tiny_llama.warn_of_unknown("".join(texts), self.tokenizer)

    def make_base(self) -> Path:
        """Train a tiny LLaMA on the grammar's sentences and save it as a checkpoint."""
        texts = tiny_llama.known_text(self.options.seed)
        tokenizer = tiny_llama.character_tokenizer(texts)
        set_seed(self.options.seed)
        model = tiny_llama.tiny_llama(tokenizer)
        data = self.blocks(texts, tokenizer)
        if self.options.base_steps:
            self.trainer(model, data, 3e-3, self.options.base_steps).train()
        folder = self.folder / "base"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def blocks(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> list[Block]:
        """Put texts after each other and cut them to blocks of equal length.

        Raises:
            ValueError: If they do not fill one block.
        """
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        kept = [text for text in texts if text.strip()]
        rows = tokenizer(kept)["input_ids"] if kept else []
        tokens = torch.tensor([*chain.from_iterable(row + ends for row in rows)])
        blocks = tokens.split(self.options.block)[: len(tokens) // self.options.block]
        if not blocks:
            raise ValueError(
                f"{len(texts)} texts have {len(tokens)} tokens, less than one block of "
                f"{self.options.block}. Pass more with --text or a smaller --block."
            )
        return [{"input_ids": block, "labels": block} for block in blocks]

    def load_base(self) -> nn.Module:
        """Load the model, as it is before any adapter, where it will be trained."""
        set_seed(self.options.seed)
        dtype = getattr(torch, self.options.dtype)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype)
        return model.to(TrainingArguments(output_dir=str(self.folder)).device)

    def ird(self, base: nn.Module, budget: int | None) -> peft.PeftModel:
        """Wrap a model, with the weights that the training blocks choose."""
        config = IRDConfig(
            task_type="CAUSAL_LM",
            method=self.options.method,
            budget=budget,
            density=None if budget else self.options.density,
            target_modules="all-linear",
            scope=self.options.scope,
            temperature=self.options.temperature,
            calibration=Calibration(self.train),
            num_samples=min(self.options.num_samples, len(self.train)),
            seed=self.options.seed,
        )
        return get_peft_model(base, config)

    def lora(self) -> peft.PeftModel:
        """Wrap the model, with low-rank updates of the same modules."""
        rank = self.options.lora
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
        )
        return get_peft_model(self.load_base(), config)

    def trainer(
        self, model: nn.Module, data: list[Block], rate: float, steps: int
    ) -> Trainer:
        """Return the stock Trainer."""
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=0.06,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            seed=self.options.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def learn(
        self, method: str, model: peft.PeftModel, rate: float, seconds: float = 0.0
    ) -> Run:
        """Train an adapter; save, reload, merge and export it."""
        trainer = self.trainer(model, self.train, rate, self.options.steps)
        before, text_before = self.perplexity(trainer), self.continued(model)
        start = time.perf_counter()
        trainer.train()
        trained = time.perf_counter() - start
        text = self.continued(model)
        folder = self.folder / method.lower()
        model.save_pretrained(str(folder))
        reloaded, merged = self.reload(folder, model.device)
        plain = self.trainer(merged, self.train, rate=0.0, steps=0)
        return Run(
            method=method,
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            perplexity_before=before,
            perplexity_after=self.perplexity(trainer),
            perplexity_merged=self.perplexity(plain),
            text_before=text_before,
            text_after=text,
            selection_seconds=seconds,
            training_seconds=trained,
            adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
            reloaded_is_equal=self.continued(reloaded) == text,
            merged_is_equal=self.continued(merged) == text,
        )

    def perplexity(self, trainer: Trainer) -> float:
        """Return the perplexity of the held-out blocks, which are of equal length."""
        return math.exp(trainer.evaluate(self.held_out)["eval_loss"])

    def continued(self, model: nn.Module) -> str:
        """Continue the prompt by the likeliest tokens, a block of them if that fits."""
        model.eval()
        prompt = self.tokenizer(self.options.prompt, return_tensors="pt")
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf
        room = max(1, longest - prompt["input_ids"].shape[1])
        tokens = model.generate(
            input_ids=prompt["input_ids"].to(model.device),
            attention_mask=prompt["attention_mask"].to(model.device),
            max_new_tokens=min(self.options.block, room),
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    def reload(self, folder: Path, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Load an adapter; and merge it, to load that as if there were no PEFT."""
        options = {"dtype": getattr(torch, self.options.dtype)}
        load = AutoPeftModelForCausalLM.from_pretrained
        export = folder / "merged"
        load(str(folder), **options).merge_and_unload().save_pretrained(str(export))
        self.tokenizer.save_pretrained(str(export))
        merged = AutoModelForCausalLM.from_pretrained(str(export), **options)
        return load(str(folder), **options).to(device), merged.to(device)


if __name__ == "__main__":
    main()
