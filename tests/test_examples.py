"""The examples run from the command line, on tiny models without any network."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from peft_ird import Selection
from tests.conftest import bert_config, gpt2_config, llama_config

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def tiny_checkpoint(folder: Path, kind: str) -> Path:
    """Save a tiny model and a tokenizer of single characters."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    special = {"unk_token": "[UNK]"}
    if kind == "bert":
        model = BertModel(bert_config(max_position_embeddings=128))
        special["pad_token"] = "[PAD]"
    elif kind == "llama":
        model = LlamaModel(llama_config())
        special["eos_token"] = "[SEP]"
    else:
        of_kind = GPT2LMHeadModel if kind == "gpt2-lm" else GPT2Model
        model = of_kind(gpt2_config(n_positions=128))
        special["eos_token"] = "[SEP]"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder
    )
    model.save_pretrained(folder)
    return folder


def test_the_grammar_is_balanced_and_its_words_are_held_out(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    grammar = importlib.import_module("grammar")
    training = grammar.write_sentences(400, grammar.TRAINING, 0)
    held_out = grammar.write_sentences(400, grammar.HELD_OUT, 0)
    assert training == grammar.write_sentences(400, grammar.TRAINING, 0)
    for rows in (training, held_out):
        assert len({row["sentence"] for row in rows}) == 400
        assert sum(row["label"] for row in rows) == 200
    kinds = vars(grammar.TRAINING)
    for kind, words in kinds.items():
        assert not set(words.split()) & set(vars(grammar.HELD_OUT)[kind].split())


def run_quickstart(*arguments: str | Path) -> str:
    return run_example("quickstart.py", *arguments)


def run_example(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = ["--epochs", "1", "--max-train", "48", "--max-eval", "16", "--num-samples", "8"]


def check_results(folder: Path, printed: str) -> None:
    results = json.loads((folder / "results.json").read_text())
    ird, lora = results["runs"]
    assert (ird["method"], lora["method"]) == ("IRD", "LoRA")
    assert ird["adapter_parameters"] == lora["adapter_parameters"] > 0
    assert ird["head_parameters"] == lora["head_parameters"]
    entries = sum(place["entries"] for place in ird["places"].values())
    assert entries == ird["adapter_parameters"]
    selection = Selection.load(folder / "selection.safetensors")
    assert len(selection) == entries
    assert selection.summary() in printed
    for picture in ("selection.png", "stages.png"):
        assert (folder / picture).stat().st_size > 1000
    assert (folder / "ird" / "adapter_model.safetensors").exists()


def test_the_quickstart_on_a_tiny_bert(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "bert")
    printed = run_quickstart("--model", model, "--output-dir", tmp_path / "out", *SMALL)
    check_results(tmp_path / "out", printed)


def test_the_quickstart_on_parquet_files_and_a_model_without_padding(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "sentence1": ["a b c", "d e", "f g h i", "k l"] * 12,
        "sentence2": ["b c", "e f g", "h", "l m n"] * 12,
        "label": [0.5, 4.0, 2.5, 1.0] * 12,
        "idx": list(range(48)),
    }
    folder = tmp_path / "glue" / "stsb"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / f"{split}.parquet"))
    model = tiny_checkpoint(tmp_path / "model", "gpt2")
    printed = run_quickstart(
        "--model", model, "--task", "stsb", "--data-dir", tmp_path / "glue",
        "--output-dir", tmp_path / "out", *SMALL,
    )  # fmt: skip
    check_results(tmp_path / "out", printed)


SHORT = ["--steps", "2", "--block", "16", "--num-samples", "8"]


def test_the_language_model_that_is_made_here(tmp_path):
    base = ["--base-steps", "2", "--output-dir", tmp_path]
    printed = run_example("causal_lm.py", "--lora", *base, *SHORT)
    results = json.loads((tmp_path / "results.json").read_text())
    ird, lora = results["runs"]
    assert (ird["method"], lora["method"]) == ("IRD", "LoRA")
    assert ird["parameters"] == lora["parameters"] > 0
    for run in (ird, lora):
        assert run["perplexity_before"] == ird["perplexity_before"]
        assert run["perplexity_after"] != run["perplexity_before"]
        assert run["reloaded_is_equal"]
        assert run["merged_is_equal"]
        assert run["perplexity_merged"] == pytest.approx(run["perplexity_after"])
        assert run["text_after"] in printed
    assert not list((tmp_path / "ird" / "merged").glob("adapter*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_on_a_text_of_ones_own(tmp_path, dtype):
    model = tiny_checkpoint(tmp_path / "model", "gpt2-lm")
    text = tmp_path / "text"
    text.write_text("abc def ghi\n\njkl mno pqr\nstu vwx yza\n" * 96, "utf-8")
    run_example(
        "causal_lm.py", "--model", model, "--text", text, "--dtype", dtype,
        "--method", "random", "--density", "0.05", "--output-dir", tmp_path / "out",
        *SHORT, "--block", "128",  # all that the model can read
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (run,) = results["runs"]
    assert run["method"] == "RANDOM"
    assert run["reloaded_is_equal"]
    assert results["blocks"]["train"] > 8 * results["blocks"]["held_out"] > 0
    if dtype == "float32":  # a merge into bfloat16 rounds
        assert run["merged_is_equal"]


def test_the_tiny_llama_is_as_new_and_says_what_it_cannot_read(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    causal_lm = importlib.import_module("causal_lm")
    (tmp_path / "text").write_text("the ÄÖ\n" * 40, "utf-8")
    options = causal_lm.parse_arguments(
        f"--text {tmp_path / 'text'} --base-steps 0 --block 16 --output-dir "
        f"{tmp_path}".split()
    )
    with torch.random.fork_rng(devices=[]):
        with pytest.warns(UserWarning, match=r"33\.33% of the characters of --text"):
            lesson = causal_lm.Lesson(options)
        made = lesson.load_base().state_dict()
        causal_lm.set_seed(0)
        new = causal_lm.tiny_llama.tiny_llama(lesson.tokenizer).state_dict()
    assert all(made[name].equal(values) for name, values in new.items())
    with pytest.raises(ValueError, match="2 texts have 0 tokens, less than one block"):
        lesson.blocks(["", " "], lesson.tokenizer)


@pytest.mark.parametrize(
    ("name", "option"),
    [("quickstart", "method"), ("causal_lm", "method"), ("causal_lm", "scope")],
)
def test_an_unknown_choice_is_refused_at_once(monkeypatch, capsys, name, option):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_arguments([f"--{option}", "typo"])
    assert "invalid choice: 'typo'" in capsys.readouterr().err


def test_where_memory_cannot_be_measured_there_is_a_dash(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    report = importlib.import_module("report")
    assert report.peak_memory() > 2**20
    monkeypatch.setattr(sys, "platform", "win32")
    assert report.peak_memory() is None
    run = report.Run("IRD", "f1", 0.1, 0.2, 1, 1, 1.0, 1.0, None, "a", 1, {}, None)
    assert report.format_table([run]).splitlines()[7].split() == [
        "peak", "memory,", "MiB", "-",
    ]  # fmt: skip


def test_a_text_that_fills_no_block_is_refused(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "gpt2-lm")
    (tmp_path / "text").write_text("ab\ncd\n", "utf-8")
    with pytest.raises(AssertionError, match="less than one block of 64"):
        run_example(
            "causal_lm.py", "--model", model, "--text", tmp_path / "text",
            "--output-dir", tmp_path / "out",
        )  # fmt: skip
