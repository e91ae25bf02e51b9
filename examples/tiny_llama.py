"""A LLaMA small enough to be trained on the spot, and text for it and for its adapter.

It reads single characters and learns sentences of the quickstart's grammar. The text to
fine-tune it on has the same grammar and other words.
"""

import warnings
from collections.abc import Sequence

from grammar import HELD_OUT, TRAINING, Lexicon, write_sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "character_tokenizer",
    "known_text",
    "new_text",
    "tiny_llama",
    "warn_of_unknown",
]

_SENTENCES = 1500


def known_text(seed: int) -> list[str]:
    """Return acceptable sentences in the words of the grammar's training set."""
    return _acceptable(TRAINING, seed)


def new_text(seed: int) -> list[str]:
    """Return acceptable sentences in its other words."""
    return _acceptable(HELD_OUT, seed)


def character_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows the characters of these texts."""
    tokens = ["<unk>", "</s>", *sorted(set("".join(texts)))]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )


def warn_of_unknown(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Warn of characters that this tokenizer cannot tell apart."""
    known = tokenizer.get_vocab()
    unknown = sum(character not in known for character in text)
    if unknown:
        warnings.warn(
            f"The tiny LLaMA does not know {unknown / len(text):.2%} of the characters "
            "of --text: it reads each as <unk>. Pass a --model that knows them.",
            stacklevel=3,
        )


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model of 0.4 M weights, not yet trained."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _acceptable(lexicon: Lexicon, seed: int) -> list[str]:
    rows = write_sentences(2 * _SENTENCES, lexicon, seed)
    return [str(row["sentence"]) for row in rows if row["label"]]
