"""``python -m peft_ird``: look at adapters, selections and searches; merge adapters."""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from peft_ird.config import IRDConfig
from peft_ird.search.result import SearchResult
from peft_ird.selection.selection import Selection
from peft_ird.selection.table import aligned
from peft_ird.sparse.storage import load_tensors

_CLASSES = {
    "CAUSAL_LM": AutoPeftModelForCausalLM,
    "FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction,
    "QUESTION_ANS": AutoPeftModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": AutoPeftModelForTokenClassification,
}
_HEAD = re.compile(r"(^|\.)(classifier|score)\.(.*\.)?weight$")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_ABOUT = "Look at adapters, selections and searches; merge adapters."
_ADAPTER, _SEARCH = "adapter_config.json", "search.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Those of the command line. Default: those of this process.

    Returns:
        The exit code: 0, or 1 after an error, which is on the standard error stream.
    """
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(options.run(options) + "\n")
    except (ImportError, OSError, LookupError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peft_ird", description=_ABOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="say what is in a file or folder")
    inspect.add_argument("path", type=Path, metavar="PATH",
                         help="an adapter, a search or a selection file")  # fmt: skip
    inspect.set_defaults(run=_inspect)

    plot = commands.add_parser("plot", help="draw a search or a selection")
    plot.add_argument("path", type=Path, metavar="RESULT",
                      help="a search's folder, or a selection file")  # fmt: skip
    plot.add_argument("--counterpart", type=Path, metavar="RESULT",
                      help="the search to compare with, drawn on the left")  # fmt: skip
    plot.add_argument("--output", type=Path, metavar="FILE",
                      help="the picture (default: beside RESULT)")  # fmt: skip
    plot.set_defaults(run=_plot)

    merge = commands.add_parser("merge", help="write the model that an adapter makes")
    merge.add_argument("adapter", metavar="ADAPTER", help="folder")
    merge.add_argument("output", type=Path, metavar="OUTPUT",
                       help="new folder for the model and its tokenizer")  # fmt: skip
    merge.add_argument("--num-labels", type=int, metavar="N",
                       help="number of labels (default: that of `classifier` or "
                       "`score` in the adapter, else the base model's)")  # fmt: skip
    merge.add_argument("--dtype", default="auto",
                       help="of the merged model, as float32 (default: the base "
                       "model's; few bits lose small deltas)")  # fmt: skip
    merge.set_defaults(run=_merge)
    return parser


def _inspect(options: argparse.Namespace) -> str:
    path: Path = options.path
    if path.is_file():
        return Selection.load(path).summary()
    if (path / _SEARCH).is_file():
        result = SearchResult.load(path)
        errors = [
            f"{n:,} samples at density {density:g} failed: {failure}"
            for (n, density), failure in result.errors.items()
        ]
        return "\n".join([f"{result!r}\n", result.table(), *errors])
    if (path / _ADAPTER).is_file():
        return _describe_adapter(_adapter_config(path))
    raise ValueError(
        f"'{path}' is no adapter (it has no {_ADAPTER}), no search (no {_SEARCH}) and "
        "no selection file."
    )


def _adapter_config(source: str | Path) -> IRDConfig:
    config: Any = IRDConfig.from_pretrained(str(source))
    if not isinstance(config, IRDConfig):
        kind = str(config.peft_type.value)
        raise ValueError(f"'{source}' is an adapter of type {kind}, not IRD.")
    return config


def _describe_adapter(config: IRDConfig) -> str:
    """Say where an adapter comes from and which modules it changes."""
    counts = config.nnz_pattern or {}
    total = sum(sum(named.values()) for named in counts.values())
    origin = config.provenance or {}
    candidates = origin.get("num_candidates")
    share = (
        f" ({100 * total / candidates:.3g} % of {candidates:,})" if candidates else ""
    )
    facts = {
        "base model": config.base_model_name_or_path,
        "task": config.task_type,
        "entries": f"{total:,}{share} in {len(counts)} modules",
        "format version": config.format_version,
        "provenance": json.dumps(origin) if origin else "not recorded",
    }
    rows = [["module", "parameter", "entries"]]
    rows += [[m, n, f"{k:,}"] for m, named in counts.items() for n, k in named.items()]
    lines = [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n\n" + aligned(rows)


def _plot(options: argparse.Namespace) -> str:
    path: Path = options.path
    output = options.output
    if path.is_dir():
        output = output or path / "search.png"
        other = options.counterpart and SearchResult.load(options.counterpart)
        SearchResult.load(path).plot(output, other)
    elif options.counterpart is not None:
        raise ValueError("`--counterpart` compares two searches; RESULT is none.")
    else:
        output = output or path.with_suffix(".png")
        drawing = importlib.import_module("peft_ird.search.plot")
        drawing.plot_selection(Selection.load(path), output)
    return str(output)


def _dtype(name: str) -> Any:
    dtype = name if name == "auto" else getattr(torch, name, None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"`--dtype` must be 'auto' or one of torch's, as float32, got {name!r}."
        )
    return dtype


def _merge(options: argparse.Namespace) -> str:
    config = _adapter_config(options.adapter)
    base = config.base_model_name_or_path
    if base is None:
        raise ValueError(
            f"'{options.adapter}' names no base model, as that was made from a "
            f"configuration. Save it, and write its folder into {_ADAPTER} as "
            "`base_model_name_or_path`."
        )
    output: Path = options.output
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ValueError(f"'{output}' is not empty. Name a new folder.")
    labels = _label_count(Path(options.adapter), options.num_labels)
    kwargs: dict[str, Any] = {"dtype": _dtype(options.dtype)}
    revision = {"revision": config.revision} if config.revision else {}
    if labels and labels != AutoConfig.from_pretrained(base, **revision).num_labels:
        # The head that the base brings is replaced by the adapter's.
        kwargs |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    auto_class = _CLASSES.get(config.task_type, AutoPeftModel)
    model = auto_class.from_pretrained(options.adapter, **kwargs)
    model.merge_and_unload().save_pretrained(str(output))
    for source, version in ((options.adapter, {}), (base, revision)):
        if _has_tokenizer(source):
            AutoTokenizer.from_pretrained(source, **version).save_pretrained(
                str(output)
            )
            return f"{output}, with its tokenizer"
    return f"{output}, without a tokenizer: none was found"


def _has_tokenizer(source: str) -> bool:
    """Return whether there are files of one; without them it would be an empty one."""
    is_listed = any(Path(source, name).is_file() for name in _VOCABULARIES)
    return is_listed or bool(get_tokenizer_config(source))


def _label_count(adapter: Path, given: int | None) -> int | None:
    """Return the number of labels of the classifier that is in an adapter, if any.

    Raises:
        ValueError: If it has none of as many as are given.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return given
    tensors, _ = load_tensors(file)
    whole = {name: t for name, t in tensors.items() if ".irdelta_" not in name}
    if given is None:
        heads = [t for name, t in sorted(whole.items()) if _HEAD.search(name)]
        return heads[-1].shape[0] if heads else None
    if not any(t.shape[:1] == (given,) for t in whole.values()):
        raise ValueError(
            f"`--num-labels` is {given}, but no head in '{adapter}' has that many rows."
        )
    return given


if __name__ == "__main__":
    sys.exit(main())
