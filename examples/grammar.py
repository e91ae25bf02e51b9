"""Sentences of a small grammar, acceptable or not.

A sentence is about one rule of English (`RULES`) and follows or breaks it. Both labels
have the same sentence shapes, so that no single word gives the answer away. Nouns,
verbs and adjectives of `HELD_OUT` never occur in `TRAINING`: what is learned must be
the rules.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["HELD_OUT", "RULES", "TRAINING", "Lexicon", "write_sentences"]


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
