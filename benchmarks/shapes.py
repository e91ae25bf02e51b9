"""Models with random weights, their targets and a batch, for `step.py`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

Batch = dict[str, Tensor]
BLOCKS = {"bert": "bert.encoder.", "gpt2": "transformer.h.", "llama": "model.layers."}


@dataclass(frozen=True)
class Shape:
    """A model's sizes and those of its batch.

    Args:
        family: ``"bert"`` (a classifier), ``"gpt2"`` or ``"llama"`` (language models).
        width: Hidden size.
        depth: Number of blocks.
        heads: Attention heads.
        inner: Width inside the feed-forward parts.
        vocabulary: Number of tokens.
        groups: Heads of keys and values, in LLaMA.
        batch: Samples of a batch.
        length: Tokens of a sample; there is no padding.
    """

    family: str
    width: int
    depth: int
    heads: int
    inner: int
    vocabulary: int
    groups: int = 0
    batch: int = 4
    length: int = 128


_TINY = Shape("bert", 32, 2, 4, 64, 100, batch=2, length=16)
SHAPES = {
    "tiny": _TINY,
    "tiny-gpt2": replace(_TINY, family="gpt2"),
    "tiny-llama": replace(_TINY, family="llama", groups=2),
    "bert-base": Shape("bert", 768, 12, 12, 3072, 30522, batch=8),
    "gpt2": Shape("gpt2", 768, 12, 12, 3072, 50257),
    # The head's share of the work, a sixth, is about that of LLaMA-3.2-1B.
    "llama": Shape("llama", 1024, 4, 16, 2816, 8192, groups=4),
    "llama-1b": Shape("llama", 2048, 16, 32, 8192, 128256, groups=8, length=1024),
}


def build(
    shape: Shape, seed: int, device: str = "cpu", dtype: str = "float32"
) -> nn.Module:
    """Return a frozen model in training mode, without dropout."""
    torch.manual_seed(seed)
    size = max(512, shape.length)
    model: nn.Module
    if shape.family == "bert":
        config = BertConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=shape.inner,
            max_position_embeddings=size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = BertForSequenceClassification(config)
    elif shape.family == "gpt2":
        config = GPT2Config(
            vocab_size=shape.vocabulary,
            n_embd=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            n_inner=shape.inner,
            n_positions=size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            intermediate_size=shape.inner,
            max_position_embeddings=size,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
    model = model.to(device, getattr(torch, dtype)).train()
    return model.requires_grad_(False)


def targets(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of all blocks by name; they are what is trained."""
    start = BLOCKS[model.config.model_type]
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(start) and isinstance(module, nn.Linear | Conv1D)
    }


def draw(shape: Shape, seed: int, device: str = "cpu") -> Batch:
    """Return a batch of random tokens, with random labels or itself as labels."""
    random = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.length)
    ids = torch.randint(shape.vocabulary, size, generator=random)
    labels = ids
    if shape.family == "bert":
        labels = torch.randint(2, size[:1], generator=random)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
