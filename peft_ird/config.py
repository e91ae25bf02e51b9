"""The configuration of the tuner."""

import copy
import inspect
import tempfile
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from peft_ird._registration import IRD
from peft_ird.options import as_plain, check, check_format, ignores_base_mismatch
from peft_ird.patterns import from_lines, to_lines
from peft_ird.selection.calibration import Calibration
from peft_ird.selection.criteria import NEEDS_DATA
from peft_ird.selection.schedule import check_schedule
from peft_ird.selection.selection import Selection
from peft_ird.sparse.storage import Entries, read_adapter_file

__all__ = ["IRDConfig"]

C = TypeVar("C", bound=PeftConfig)

_RUNTIME_ONLY = ("calibration", "selection", "memory_limit", "ignore_base_mismatch")


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a help text."""
    return field(default=default, metadata={"help": text})


def documented(config: type[C]) -> type[C]:
    """Put the help texts of a configuration's own fields into its docstring."""
    arguments = [
        textwrap.fill(
            f"{name}: {config.__dataclass_fields__[name].metadata['help']}",
            width=88,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for name in inspect.get_annotations(config)
    ]
    head, raises, tail = (inspect.getdoc(config) or "").partition("Raises:")
    config.__doc__ = "\n".join([f"{head}Args:", *arguments, "", raises + tail])
    return config


_CARD = """
## Loading

The adapter is of the type IRD, which PEFT knows once `peft_ird` is imported:

```python
import peft_ird
```
"""


@documented
@dataclass
class IRDConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of an [`IRDModel`]: which entries are trained, and how many.

    Raises:
        ValueError: If an option is unknown or out of range, or if not exactly one of
            ``density`` and ``budget`` says how much to train.
    """

    density: float | None = option(
        None,
        "Share of the candidate entries to train, in (0, 1]. Or pass `budget`.",
    )
    budget: int | None = option(
        None,
        "Exact number of entries to train, e.g. that of a LoRA. Or pass `density`.",
    )
    method: str = option(
        "ird",
        "How entries are chosen: 'ird', 'reverse_ird', 'fish' and 'gradient' rank "
        "them on calibration data; 'magnitude', 'random' and 'bias' (BitFit; "
        "without `density` or `budget` every bias) need none.",
    )
    num_samples: int | None = option(
        None,
        "Calibration samples to start from, drawn by `seed`. Default: 128, or all "
        "where there are fewer. A `schedule` other than 'halving' has its own.",
    )
    num_ranked_samples: int | None = option(
        None,
        "Samples to rank by their squared gradient over all candidates before "
        "anything else; the best of them are those to start from. Default: none, they "
        "are drawn by `seed` alone.",
    )
    initial_density: float | None = option(
        None,
        "Density that 'halving' starts from. Default: 0.025, or four times `density` "
        "(at most 1) from there on.",
    )
    schedule: str | list[tuple[int, float]] = option(
        "halving",
        "Cells to walk: 'halving', 'paper' (Table 3), or a list of (num_samples, "
        "density) that ends at the density asked for.",
    )
    nested: bool = option(
        False,
        "Rank inside the current entries only. Default: after the samples shrink, "
        "rank all candidates anew.",
    )
    sample_score: str = option(
        "selected",
        "Entries that a sample's score sums over: 'selected' (the current ones) or "
        "'all' candidates.",
    )
    sample_scaling: str = option(
        "none",
        "What a sample's score is divided by: 'none', 'length' (its tokens) or 'loss' "
        "(its loss squared, so that badly predicted samples do not win by that alone).",
    )
    trim_samples: float = option(
        0.0,
        "Share of the samples, in [0, 1), that is left out as outliers whenever "
        "samples are ranked: those that would come first.",
    )
    fisher: str = option(
        "empirical",
        "Labels of the Fisher information: 'empirical' (the data's) or 'sampled' "
        "(drawn from the model).",
    )
    scope: str = option(
        "global",
        "'global': one budget for all; 'per_module': each module gets its share by "
        "size; 'balanced': one budget, each module's scores divided by their mean.",
    )
    temperature: float = option(
        0.0,
        "0 chooses the entries with the largest scores. Above 0 they are drawn by "
        "`seed`, one by one, with probabilities proportional to score ** (1 / "
        "temperature), or its inverse for 'reverse_ird': more spread out the higher.",
    )
    head_warmup_steps: int = option(
        0,
        "Steps of 32 samples that the head is trained for before gradients are taken; "
        "afterwards it is as fresh as before.",
    )
    head_warmup_learning_rate: float = option(
        1e-3,
        "Learning rate of that warm-up, with Adam.",
    )
    memory_limit: int | None = option(
        None,
        "Bytes beyond the model, divided among sums, a batch and kept gradients; "
        "small temporaries come on top. Default: what is free on a GPU; elsewhere no "
        "limit, but for kept gradients a quarter of the memory, at most 8 GiB. Kept at "
        "run time only.",
    )
    seed: int = option(
        0,
        "Seed of every random choice of the selection.",
    )
    init_weights: bool = option(
        True,
        "Start from a zero delta. False draws random values, for tests only.",
    )
    target_modules: set[str] | list[str] | str | None = option(
        None,
        "Names or regular expression of the modules whose parameters are "
        "candidates, or 'all-linear'. Default: every module outside "
        "`modules_to_save`.",
    )
    exclude_modules: set[str] | list[str] | str | None = option(
        None,
        "Names or regular expression of modules to leave out.",
    )
    layers_to_transform: list[int] | int | None = option(
        None,
        "Indices of the layers to adapt, if `target_modules` is no expression.",
    )
    layers_pattern: list[str] | str | None = option(
        None,
        "Name of the layer list, if not a common one, for `layers_to_transform`.",
    )
    modules_to_save: list[str] | None = option(
        None,
        "Modules that are trained and saved whole, as the head of a classifier; "
        "their parameters are no candidates.",
    )
    nnz_pattern: dict[str, dict[str, int]] | None = option(
        None,
        "Entries per module and parameter; written by the selection.",
    )
    shape_pattern: dict[str, dict[str, list[int]]] | None = option(
        None,
        "Shapes of these parameters; written by the selection.",
    )
    save_dtype: str | None = option(
        None,
        "Type of the values in the file: 'float32', or 'bfloat16' for a third less "
        "space. Default: the type that they are trained in, float32 unless "
        "`autocast_adapter_dtype` was off.",
    )
    format_version: int | None = option(
        None,
        "Version of the file's format; written when the adapter is saved.",
    )
    provenance: dict[str, Any] | None = option(
        None,
        "How the entries were chosen and by which versions; written by the selection.",
    )
    fingerprint: dict[str, dict[str, str]] | None = option(
        None,
        "Hashes of the base weights at the entries, per module and type that they are "
        "rounded to; written when the adapter is saved.",
    )
    ignore_base_mismatch: bool = option(
        False,
        "Load the adapter onto base weights with other fingerprints, too. Kept at run "
        "time only.",
    )
    calibration: Any = option(
        None,
        "Data for the methods that need it. Kept at run time only.",
    )
    selection: Selection | None = option(
        None,
        "A finished selection to use instead of a new one. Kept at run time only.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = IRD
        for each in fields(self):
            setattr(self, each.name, as_plain(getattr(self, each.name)))
        check_format(self)
        if any(isinstance(said, str) for said in (self.nnz_pattern or {}).values()):
            read = from_lines(self.nnz_pattern or {})  # as in a file
            self.nnz_pattern, self.shape_pattern, self.fingerprint = read
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.calibration is not None:
            self.calibration = Calibration.of(self.calibration)
        self.ignore_base_mismatch = self.ignore_base_mismatch or ignores_base_mismatch()
        # A pattern that came with the arguments describes weights still to be loaded.
        self._describes_file = self.nnz_pattern is not None
        self._entries: Entries | None = None  # of the file, until they are injected
        check(self, sized_otherwise=self._describes_file)
        self.schedule = check_schedule(self.schedule)

    @property
    def awaits_weights(self) -> bool:
        """Whether entries come from a file to be loaded, not from a new selection."""
        is_described = self._describes_file and self.nnz_pattern is not None
        return is_described and self.selection is None

    @property
    def needs_data(self) -> bool:
        """Whether the method ranks entries on calibration data."""
        return self.method in NEEDS_DATA

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, without run-time objects."""
        bare = copy.copy(self)
        for name in _RUNTIME_ONLY:
            setattr(bare, name, None)
        everything: dict[str, Any] = PeftConfig.to_dict(bare)
        return {k: v for k, v in everything.items() if k not in _RUNTIME_ONLY}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, whole or not at all.

        A model card of PEFT's beside it, or above, says what to import.

        Args:
            save_directory: The folder.
            **kwargs: Passed on to PEFT.
        """
        place = Path(save_directory)
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".") as spare:
            PeftConfig.save_pretrained(self._in_lines(), spare, **kwargs)
            Path(spare, CONFIG_NAME).replace(place / CONFIG_NAME)
        card = _card_of(place)
        text = card.read_text("utf-8") if card.is_file() else ""
        if "library_name: peft" in text and "import peft_ird" not in text:
            with card.open("a", encoding="utf-8") as file:
                file.write(_CARD)

    def _in_lines(self) -> "IRDConfig":
        """Return a copy that says of each module all in one line, if it is known."""
        brief, shapes = copy.copy(self), self.shape_pattern or {}
        counts = (self.nnz_pattern or {}).items()
        if all(named.keys() == shapes.get(name, {}).keys() for name, named in counts):
            lines = to_lines(dict(counts), shapes, self.fingerprint or {})
            brief.nnz_pattern = lines or self.nnz_pattern  # type: ignore[assignment]
            brief.shape_pattern = brief.fingerprint = None
        return brief

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> "IRDConfig":
        """Load the configuration; a local weight file beside it is checked first.

        Args:
            pretrained_model_name_or_path: Folder or hub repository.
            subfolder: Folder inside it.
            **kwargs: Passed on to PEFT.

        Returns:
            The configuration.

        Raises:
            ValueError: If the weight file is damaged or disagrees with the
                configuration; nothing has been changed by then.
        """
        config: IRDConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        if not isinstance(config, cls):  # PEFT returns the type that was saved
            return config
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        found = read_adapter_file(folder, config.nnz_pattern, config.shape_pattern)
        if found is not None:
            config._entries, replaced = found
            config.forget_fingerprints(replaced)
        return config

    def forget_fingerprints(self, modules: Collection[str]) -> None:
        """Do not compare the base weights of modules that are loaded as well."""
        if self.fingerprint:
            hashes = self.fingerprint.items()
            self.fingerprint = {name: h for name, h in hashes if name not in modules}

    # Run-time objects are shared by copies, and left out of pickles.
    def __copy__(self) -> "IRDConfig":
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> "IRDConfig":
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            shared = name in _RUNTIME_ONLY
            clone.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        bare = {**dict.fromkeys(_RUNTIME_ONLY), "_entries": None}
        cannot_select = self.needs_data and self.nnz_pattern is not None
        describes_file = self._describes_file or cannot_select
        facts = {"ignore_base_mismatch": False, "_describes_file": describes_file}
        return {**self.__dict__, **bare, **facts}


def _card_of(place: Path) -> Path:
    """Return the model card that PEFT wrote for the adapter in a folder.

    That is above the folder of an adapter that is not called "default", unless an
    adapter of another kind is there.
    """
    above = place.parent / CONFIG_NAME
    if (place / "README.md").is_file():
        return place / "README.md"
    if above.is_file() and f'"{IRD.value}"' not in above.read_text("utf-8"):
        return place / "README.md"
    return place.parent / "README.md"
