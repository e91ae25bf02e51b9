"""Tiny models and data: no network, no checkpoint."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VOCABULARY = 40
torch.set_num_threads(1)  # the models are too small to share
settings.register_profile("unhurried", deadline=None)  # other work may be beside
settings.load_profile("unhurried")


def bert_config(**kwargs: Any) -> BertConfig:
    kwargs.setdefault("max_position_embeddings", 16)
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        **kwargs,
    )


def llama_config(**kwargs: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **kwargs,
    )


def gpt2_config(n_positions: int = 32) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=n_positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def t5_config() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


# name -> (model, task type); the language models have tied embeddings but one
MODELS = {
    "bert": (lambda: BertForSequenceClassification(bert_config()), "SEQ_CLS"),
    "gpt2": (lambda: GPT2LMHeadModel(gpt2_config()), "CAUSAL_LM"),
    "llama": (
        lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)),
        "CAUSAL_LM",
    ),
}
OTHER_MODELS = {
    "llama-untied": (
        lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=False)),
        "CAUSAL_LM",
    ),
    "llama-classifier": (
        lambda: LlamaForSequenceClassification(llama_config(num_labels=3)),
        "SEQ_CLS",
    ),
    "bert-regression": (
        lambda: BertForSequenceClassification(bert_config(num_labels=1)),
        "SEQ_CLS",
    ),
    "bert-tokens": (
        lambda: BertForTokenClassification(bert_config(num_labels=3)),
        "TOKEN_CLS",
    ),
    "bert-questions": (lambda: BertForQuestionAnswering(bert_config()), "QUESTION_ANS"),
    "t5": (lambda: T5ForConditionalGeneration(t5_config()), "SEQ_2_SEQ_LM"),
}
ALL_MODELS = {**MODELS, **OTHER_MODELS}


def make_model(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ALL_MODELS[name][0]().eval()


def task_type(name: str) -> str:
    return ALL_MODELS[name][1]


def make_samples(name: str, count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged samples with labels that fit the model's task, as lists and numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, size: int) -> list[int]:
        return torch.randint(0, high, (size,), generator=generator).tolist()

    samples = []
    for i in range(count):
        ids = [3 + t % (VOCABULARY - 3) for t in draw(1000, 4 + i % 5)]
        sample: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if name == "bert-regression":
            sample["labels"] = draw(50, 1)[0] / 10
        elif name == "bert-tokens":
            sample["labels"] = [-100, *draw(3, len(ids) - 1)]
        elif name == "bert-questions":
            sample["start_positions"], sample["end_positions"] = draw(len(ids), 2)
        elif task_type(name) == "SEQ_CLS":
            sample["labels"] = draw(2, 1)[0]
        elif name == "t5":
            sample["labels"] = [3 + t % (VOCABULARY - 3) for t in draw(1000, 4)]
        else:
            sample["labels"] = list(ids)
        samples.append(sample)
    return samples


def as_batch(sample: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value)[None] for name, value in sample.items()}


def make_batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    """A rectangular batch of three samples."""
    samples = [s for s in make_samples(name, 15, seed) if len(s["input_ids"]) == 6]
    return {k: torch.tensor([s[k] for s in samples]) for k in samples[0]}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ALL_MODELS)
def any_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model(name: str) -> nn.Module:
    return make_model(name)


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Call a function of a test module in several processes of one group."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found: Callable[..., list[Any]] = importlib.import_module("processes").in_processes
    return found
