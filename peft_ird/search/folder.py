"""The folder of a search: its settings, and what each cell came to."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peft_ird.adapter.record import versions
from peft_ird.search.outcome import CellRecord, Failure, Outcome
from peft_ird.selection.schedule import Cell
from peft_ird.selection.selection import Selection
from peft_ird.sparse.storage import replacing

__all__ = ["CellFolder", "SearchFolder"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_MAX_DIFFERENCES = 8
_HINTS = {
    "base": "model_init() must return the same weights each time, so seed a new head "
    "inside it, as with torch.manual_seed(0).",
}


class CellFolder:
    """The files of one cell.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.record = path / "outcome.json"
        self._selection = path / "selection.safetensors"

    @property
    def is_selected(self) -> bool:
        """Whether the entries have been chosen."""
        return self._selection.is_file()

    @property
    def selection(self) -> Selection:
        """The entries."""
        return Selection.load(self._selection)

    def begin(self, cell: Cell, selection: Selection) -> None:
        """Keep what was selected; nothing else is known yet.

        Args:
            cell: The samples and the density.
            selection: The entries.
        """
        self.write(CellRecord(cell, len(selection)))
        selection.save(self._selection)

    def read(self) -> CellRecord:
        """Return what is known of the cell."""
        facts = json.loads(self.record.read_text("utf-8"))
        failure = facts["failure"]
        return CellRecord(
            Cell(*facts["cell"]),
            facts["entries"],
            tuple(Outcome(**outcome) for outcome in facts["outcomes"]),
            None if failure is None else Failure(**failure),
        )

    def write(self, record: CellRecord) -> None:
        """Replace what is known of the cell, in one step.

        Args:
            record: What is known.
        """
        _write_json(self.record, asdict(record))

    def rung(self, number: int) -> Path:
        """Return where a training waits that stopped at a rung.

        Args:
            number: The rung, from 0.
        """
        return self.path / f"rung-{number}"

    def drop_rungs(self, keep: int | None = None) -> None:
        """Delete trainings that wait to go on.

        Args:
            keep: The rung whose training goes on.
        """
        for path in self.path.glob("rung-*"):
            if keep is None or path != self.rung(keep):
                shutil.rmtree(path)


class SearchFolder:
    """The files of a search.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = path / "search.json"
        self._lock = FileLock(path / ".lock")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the search in it.

        Raises:
            ValueError: If there is no search in it that this version reads.
        """
        if not self._settings.is_file():
            raise ValueError(
                f"'{self.path}' holds no search: there is no {self._settings.name}. "
                "Pass the `output_dir` of one."
            )
        found: Any = json.loads(self._settings.read_text("utf-8"))
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
            raise ValueError(
                f"'{self.path}' holds a search of another version of peft_ird, which "
                "cannot be read. Run it again in another folder."
            )
        return found

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write down the settings, or check that they are those of the search in it.

        Until `release` no other search can claim it. A search that has not selected
        anything yet leaves its place.

        Args:
            settings: Anything that JSON holds.

        Raises:
            ValueError: If a search with other settings is in it; the differences are
                named.
            RuntimeError: If another search runs in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"Another search runs in '{self.path}'. Wait for its end, after which "
                "this one takes over what it has done, or pass another `output_dir`."
            ) from error
        has_begun = self._settings.is_file() and any(
            c.is_selected for c in self.cells()
        )
        if not has_begun:
            facts = {"format": _FORMAT, "versions": versions()}
            _write_json(self._settings, {**facts, **settings})
            return
        found = self.settings
        began = found.pop("versions", None)
        theirs, ours = dict(_flat(found)), dict(_flat(_plain(settings)))
        names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
        if names:
            rows = [f"{n} is {theirs.get(n)!r} there, {ours.get(n)!r} here"
                    for n in names[:_MAX_DIFFERENCES]]  # fmt: skip
            rest = len(names) - len(rows)
            more = f"; and {rest} more" if rest else ""
            hints = [_HINTS[name] for name in names if name in _HINTS]
            advice = "Pass another `output_dir`, or delete this one."
            raise ValueError(
                f"'{self.path}' holds a search with other settings: {'; '.join(rows)}"
                f"{more}. {' '.join([*hints, advice])}"
            )
        if began not in (None, versions()):
            logger.warning(
                "The search in '%s' began with %s and goes on with %s; what was done "
                "before is kept.",
                self.path,
                began,
                versions(),
            )

    def release(self) -> None:
        """Let other searches claim it."""
        self._lock.release()

    def cells(self) -> list[CellFolder]:
        """Return the folders of the cells, in the order of the walk."""
        number = len(self.settings["cells"])
        return [CellFolder(self.path / f"cell-{i + 1:02d}") for i in range(number)]

    def begin(self, cells: Sequence[Cell], selections: Sequence[Selection]) -> None:
        """Keep what was selected at each cell.

        Args:
            cells: Samples and densities.
            selections: The entries.
        """
        pairs = zip(cells, selections, strict=True)
        for folder, (cell, selection) in zip(self.cells(), pairs, strict=True):
            folder.begin(cell, selection)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they look when read back."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=_as_json))
    return plain


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested settings under dotted names."""
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{name}.{key}".lstrip("."))


def _write_json(path: Path, content: Any) -> None:
    """Write a file that appears only once it is complete."""
    text = json.dumps(content, default=_as_json, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
