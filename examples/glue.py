"""The tasks of GLUE: their texts, prompts for decoders, lengths, and their files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

__all__ = ["GLUE", "GlueTask"]


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Args:
        name: Its name in GLUE.
        texts: The columns that hold its texts.
        num_labels: Number of classes; 1 for regression.
        prompt: What a decoder reads (Zhong et al., 2023, Table 1): ``{0}`` and ``{1}``
            stand for the texts.
        max_length: Tokens of a sample, prompt and all (the paper's Table 4).
        evaluations: Its validation splits.
    """

    name: str
    texts: tuple[str, ...]
    num_labels: int
    prompt: str
    max_length: int
    evaluations: tuple[str, ...] = ("validation",)

    def read(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        """Read a split.

        Args:
            split: ``"train"`` or one of ``evaluations``.
            data_dir: Folder with TASK/SPLIT.parquet; None for the hub.

        Returns:
            Rows with the texts and ``label``.

        Raises:
            ValueError: If the split has no labels, as GLUE's test sets.
        """
        if data_dir is None:
            rows = load_dataset("nyu-mll/glue", self.name, split=split)
        else:
            rows = Dataset.from_parquet(
                str(Path(data_dir, self.name, f"{split}.parquet"))
            )
        if min(rows["label"], default=-1) < 0:
            raise ValueError(f"The split {split!r} of {self.name} has no labels.")
        return rows.select_columns([*self.texts, "label"])

    def encode(
        self,
        rows: Dataset,
        tokenizer: Callable[..., Any],
        is_decoder: bool = False,
        max_length: int = 128,
    ) -> Dataset:
        """Replace the texts by tokens; a decoder reads them inside the prompt.

        Args:
            rows: Rows of a split.
            tokenizer: A Hugging Face tokenizer.
            is_decoder: Whether to use the prompt.
            max_length: Tokens that are kept of a sample.
        """

        def tokens(batch: dict[str, list[Any]]) -> Any:
            columns = [batch[name] for name in self.texts]
            if is_decoder:
                samples = zip(*columns, strict=True)
                columns = [
                    [shortened(self.prompt, s, tokenizer, max_length) for s in samples]
                ]
            return tokenizer(*columns, truncation=True, max_length=max_length)

        return rows.map(tokens, batched=True, remove_columns=list(self.texts))


def shortened(
    prompt: str, texts: Sequence[str], tokenizer: Callable[..., Any], max_length: int
) -> str:
    """Fill a prompt; where it is too long, the longer text loses its last words.

    Args:
        prompt: A `GlueTask.prompt`.
        texts: The texts of one sample.
        tokenizer: A Hugging Face tokenizer.
        max_length: Tokens that there may be.
    """
    words = [text.split() for text in texts]
    filled = prompt.format(*texts)
    while max(map(len, words)) > 1 and len(tokenizer(filled)["input_ids"]) > max_length:
        max(words, key=len).pop()
        filled = prompt.format(*map(" ".join, words))
    return filled


_SAME = (
    'For the sentence pair "{0}" and "{1}", do these two sentences have the same '
    "semantics?"
)
_ENTAILED = (
    'Given the sentence "{0}" determine if the following statement is entailed: "{1}"'
)
_PAIR = ("sentence1", "sentence2")
GLUE = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            ("sentence",),
            2,
            'For the sentence: "{0}", is the sentence grammarly correct?',  # sic
            128,
        ),
        GlueTask(
            "sst2",
            ("sentence",),
            2,
            'For the sentence: "{0}", is the sentiment in this sentence positive or '
            "negative?",
            128,
        ),
        GlueTask("mrpc", _PAIR, 2, _SAME, 128),
        GlueTask(
            "stsb",
            _PAIR,
            1,
            "Determine the similarity between the following two sentences: "
            '"{0}" and "{1}". The score should be ranging from 0.0 to 5.0, and can be '
            "a decimal.",
            256,
        ),
        GlueTask("qqp", ("question1", "question2"), 2, _SAME, 512),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            3,
            'Given the sentence "{0}" determine if the following statement is entailed '
            'or contradicted or neutral: "{1}"',
            512,
            ("validation_matched", "validation_mismatched"),
        ),
        GlueTask(
            "qnli",
            ("question", "sentence"),
            2,
            'Given the question "{0}" determine if the following sentence contains the '
            'corresponding answer: "{1}"',
            512,
        ),
        GlueTask("rte", _PAIR, 2, _ENTAILED, 384),
        GlueTask("wnli", _PAIR, 2, _ENTAILED, 128),
    )
}
