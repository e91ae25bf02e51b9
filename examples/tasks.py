"""The quickstart's data: sentences of a small grammar, or tasks in GLUE's layout.

A sentence of the grammar is about one rule of English (`RULES`) and follows or breaks
it. Both labels have the same sentence shapes, so that no single word gives the answer
away. Nouns, verbs and adjectives of the evaluation sentences never occur in training:
what is learned must be the rules.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

__all__ = [
    "HELD_OUT",
    "RULES",
    "TRAINING",
    "Lexicon",
    "Task",
    "load_tokenizer",
    "write_sentences",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Task:
    """Labelled texts for training and evaluation, and the metric they are scored by."""

    train: Dataset
    evaluation: Dataset
    metric: str
    score: Callable[[Array, Array], float]

    @classmethod
    def from_grammar(cls, num_train: int, num_eval: int, seed: int) -> "Task":
        """Write sentences, labelled 1 for acceptable and 0 for unacceptable.

        Args:
            num_train: Number of training sentences.
            num_eval: Number of evaluation sentences, of words that training never saw.
            seed: Seed of every choice.
        """
        return cls(
            Dataset.from_list(write_sentences(num_train, TRAINING, seed)),
            Dataset.from_list(write_sentences(num_eval, HELD_OUT, seed)),
            "accuracy",
            accuracy,
        )

    @classmethod
    def from_parquet(cls, folder: Path, num_train: int, num_eval: int) -> "Task":
        """Read ``train.parquet`` and ``validation.parquet``: texts and ``label``.

        Args:
            folder: The task's folder; GLUE's names have GLUE's metrics.
            num_train: Training examples to keep, the first ones.
            num_eval: Evaluation examples to keep, the first ones.
        """

        def read(split: str, limit: int) -> Dataset:
            rows = Dataset.from_parquet(str(folder / f"{split}.parquet"))
            rows = rows.select(range(min(limit, len(rows))))
            return rows.remove_columns([n for n in ("idx",) if n in rows.column_names])

        metric = _METRICS.get(folder.name, ("accuracy", accuracy))
        return cls(read("train", num_train), read("validation", num_eval), *metric)

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        labels = np.asarray(self.train["label"])
        return 1 if labels.dtype.kind == "f" else int(labels.max()) + 1

    def tokens(self, split: str, tokenizer: Callable[..., Any]) -> Dataset:
        """Return a split with its columns of text replaced by tokens.

        Args:
            split: ``"train"`` or ``"evaluation"``.
            tokenizer: A Hugging Face tokenizer.
        """
        rows: Dataset = getattr(self, split)
        texts = [name for name in rows.column_names if name != "label"]

        def encode(batch: dict[str, list[Any]]) -> Any:
            columns = [batch[name] for name in texts]
            return tokenizer(*columns, truncation=True, max_length=128)

        return rows.map(encode, batched=True, remove_columns=texts)


@dataclass(frozen=True)
class Lexicon:
    """Words, separated by spaces; each forms its plural or third person with s."""

    men: str
    women: str
    others: str
    intransitive: str
    transitive: str
    adjectives: str


TRAINING = Lexicon(
    men="boy king father brother monk nephew grandson",
    women="girl queen mother sister nun niece granddaughter",
    others="dog bird farmer teacher driver singer lawyer student sailor cook pilot "
    "guard friend goat lion tiger monkey rabbit spider snake manager",
    intransitive="sleep walk smile swim wait sing arrive work shout travel sit think "
    "listen appear shine stay",
    transitive="see help follow love visit praise blame hear describe trust "
    "remember protect",
    adjectives="old small happy clever brave loud rich kind proud strange gentle "
    "famous lazy young",
)
HELD_OUT = Lexicon(
    men="uncle son prince stepfather",
    women="aunt daughter bride stepmother",
    others="cat horse doctor painter soldier writer dancer baker neighbor nurse pig "
    "duck turtle player",
    intransitive="run laugh jump dance fall dream disappear talk breathe",
    transitive="like call know admire find want prefer invite defend",
    adjectives="tall sad tired quiet poor angry honest nervous strong little",
)

_DETERMINERS = (("a", "this", "that", "every"), ("these", "those", "many", "two"))
_PREPOSITIONS = ("near", "behind", "with", "beside")
_REFLEXIVES = ("himself", "herself")
_SINGULAR, _PLURAL = 0, 1


def write_sentences(
    count: int, lexicon: Lexicon, seed: int
) -> list[dict[str, str | int]]:
    """Write distinct sentences, in equal parts of each rule and label.

    Args:
        count: How many.
        lexicon: `TRAINING` or `HELD_OUT`.
        seed: Seed of every choice.

    Returns:
        Rows with ``sentence`` and ``label``: 1 for acceptable, 0 for unacceptable.
    """
    rng = random.Random(seed)
    rows: dict[str, int] = {}
    rules = list(RULES.values())
    while len(rows) < count:
        label, rule = len(rows) % 2, rules[len(rows) // 2 % len(rules)]
        words = rule(_Writer(lexicon, rng), bool(label))
        rows.setdefault(" ".join(words) + " .", label)
    mixed = list(rows.items())
    rng.shuffle(mixed)
    return [{"sentence": sentence, "label": label} for sentence, label in mixed]


class _Writer:
    """Draws words and phrases from a lexicon."""

    def __init__(self, lexicon: Lexicon, rng: random.Random) -> None:
        self.lexicon = lexicon
        self.rng = rng

    def number(self) -> int:
        return self.rng.choice((_SINGULAR, _PLURAL))

    def word(self, kind: str) -> str:
        words: str = getattr(self.lexicon, kind)
        return self.rng.choice(words.split())

    def noun(self, number: int) -> str:
        kind = self.rng.choice(("men", "women", "others", "others"))
        return self.word(kind) + "s" * number

    def phrase(self, number: int) -> list[str]:
        """Return a noun phrase: the (old) dogs."""
        adjective = [self.word("adjectives")] if self.rng.random() < 0.4 else []
        return ["the", *adjective, self.noun(number)]

    def aside(self) -> list[str]:
        """Return, half of the time, a phrase whose noun may mislead: near the cats."""
        if self.rng.random() < 0.5:
            return []
        return [self.rng.choice(_PREPOSITIONS), *self.phrase(self.number())]

    def predicate(self, number: int) -> list[str]:
        """Return a verb that agrees, with its object if it takes one."""
        ending = "s" * (1 - number)
        if self.rng.random() < 0.5:
            return [self.word("intransitive") + ending]
        return [self.word("transitive") + ending, *self.phrase(self.number())]


def _verb(write: _Writer, follow: bool) -> list[str]:
    """The dog near the cats sleeps; the dog near the cats sleep."""
    number = write.number()
    subject = [*write.phrase(number), *write.aside()]
    return [*subject, *write.predicate(number if follow else 1 - number)]


def _determiner(write: _Writer, follow: bool) -> list[str]:
    """These old dogs sleep; this old dogs sleep."""
    number = write.number()
    _, *rest = write.phrase(number)
    determiner = write.rng.choice(_DETERMINERS[number if follow else 1 - number])
    if determiner == "a" and rest[0][0] in "aeiou":
        determiner = "this"
    return [determiner, *rest, *write.aside(), *write.predicate(number)]


def _reflexive(write: _Writer, follow: bool) -> list[str]:
    """The boy beside the girl sees himself; the boy beside the girl sees herself."""
    number, gender = write.number(), write.rng.choice((0, 1))
    adjective = [write.word("adjectives")] if write.rng.random() < 0.4 else []
    noun = write.word(("men", "women")[gender]) + "s" * number
    forms = ["themselves"] if number else [_REFLEXIVES[gender]]
    if not follow:
        forms = [form for form in (*_REFLEXIVES, "themselves") if form not in forms]
    verb = write.word("transitive") + "s" * (1 - number)
    return ["the", *adjective, noun, *write.aside(), verb, write.rng.choice(forms)]


def _order(write: _Writer, follow: bool) -> list[str]:
    """The old dog sleeps; old the dog sleeps, the dog old sleeps, sleeps the dog."""
    number = write.number()
    subject = ["the", write.word("adjectives"), write.noun(number)]
    verb, *rest = write.predicate(number)
    if follow:
        return [*subject, verb, *rest]
    first, second, third = subject
    orders = (
        [second, first, third, verb],
        [first, third, second, verb],
        [verb, *subject],
    )
    return [*write.rng.choice(orders), *rest]


RULES: dict[str, Callable[[_Writer, bool], list[str]]] = {
    "verb": _verb,
    "determiner": _determiner,
    "reflexive": _reflexive,
    "order": _order,
}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads; those of GPT-2 and LLaMA do not by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def accuracy(predicted: Array, labels: Array) -> float:
    """Return the share of equal entries."""
    return float((predicted == labels).mean())


def correlation(predicted: Array, labels: Array) -> float:
    """Return Pearson's correlation, of binary labels Matthews'; 0 for a constant."""
    if predicted.std() == 0 or labels.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


def mean_correlation(predicted: Array, labels: Array) -> float:
    """Return the mean of Pearson's and Spearman's correlation."""
    of_ranks = correlation(_ranks(predicted), _ranks(labels))
    return (correlation(predicted, labels) + of_ranks) / 2


def f1_and_accuracy(predicted: Array, labels: Array) -> float:
    """Return the mean of F1 (of label 1) and accuracy."""
    positives = float(predicted.sum() + labels.sum())
    f1 = 2 * float((predicted * labels).sum()) / max(1.0, positives)
    return (f1 + accuracy(predicted, labels)) / 2


def _ranks(values: Array) -> Array:
    """Return ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = np.cumsum(counts) - (counts - 1) / 2
    return ranks[inverse]


_METRICS = {
    "cola": ("Matthews", correlation),
    "stsb": ("Pearson+Spearman", mean_correlation),
    "mrpc": ("F1+accuracy", f1_and_accuracy),
    "qqp": ("F1+accuracy", f1_and_accuracy),
}
