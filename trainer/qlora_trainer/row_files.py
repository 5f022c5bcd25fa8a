"""Select the files of a source that are read as rows, by their names alone, for folders, buckets and the Hub.

Every file is read, or is named: in an error, or in :class:`Selection` as a note or as another split's. Light to import.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Kind(StrEnum):
    JSON = "JSON Lines"
    PARQUET = "Parquet"
    CSV = "CSV"
    ARROW = "Arrow"
    SAVED = "datasets.save_to_disk"


KINDS = {
    ".jsonl": Kind.JSON,
    ".ndjson": Kind.JSON,
    ".json": Kind.JSON,
    ".csv": Kind.CSV,
    ".tsv": Kind.CSV,
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
}
COMPRESSIONS = (".gz", ".zst", ".bz2")
"""May follow the suffix of a text file."""
ALLOWED = (
    f"must be a file that ends in {', '.join(KINDS)} (JSON and CSV also followed by {', '.join(COMPRESSIONS)}), in"
    " capitals or not, a folder of such files, or a folder written by datasets.save_to_disk"
)
NOTE_SUFFIXES = (".md", ".rst", ".py", ".yaml", ".yml")
NOTE_NAMES = re.compile(r"(readme|license|licence|notice|copying|changelog)(\..*)?")
"""Names of files without rows that people leave beside rows, unless their suffix is that of rows. Names that begin with
a dot or an underscore (Spark's markers) count as such notes too."""
HUB_NOTE = re.compile(r"dataset_infos?\.json")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": (
        "test",
        "testing",
        "tests",
        "eval",
        "evals",
        "evaluation",
        "holdout",
        "heldout",
        "hold[-_ ]out",
        "held[-_ ]out",
    ),
}
"""As ``datasets`` finds splits in names, and more that people give to what must not be trained on."""
SPLIT_PATTERN = re.compile(
    r"(?<![^\W\d_])(?:"
    + "|".join(f"(?P<{split}>{'|'.join(words)})" for split, words in SPLIT_WORDS.items())
    + r")(?:data|file|rows|set|split)?(?![^\W\d_])"
)
"""A word between what are no letters, as in ``split=test``, ``(test)`` and ``testset2``."""
INNER_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
MOST_FILES = 100_000
SHOWN = 5
STATE = "state.json"
SPLITS = "dataset_dict.json"


class RowFilesError(ValueError):
    """The names do not say what is to be read; ``str()`` completes the sentence about the source."""


@dataclass(frozen=True)
class Selection:
    """Names of files, relative to the source, in the order in which they are read."""

    kind: Kind
    rows: tuple[str, ...]
    """Files with rows; for ``SAVED`` all files that may have rows, and those that say which do."""
    notes: tuple[str, ...] = ()
    """Not read: no rows."""
    other_splits: tuple[str, ...] = ()
    """Not read: rows of another split, or of none where others name the wanted one."""
    folder: str = ""
    """Folder of the dataset, for ``SAVED``."""

    def unread(self) -> str:
        """Name the files that are not read and why; empty where all are."""
        parts = [("of another split or of none", self.other_splits), ("without rows", self.notes)]
        return "; ".join(f"{what}: {_shown(list(names))}" for what, names in parts if names)


def kind_of(name: str) -> Kind | None:
    """Tell the kind of a file of rows; None where it is none."""
    lower = name.lower()
    plain = lower.removesuffix(compression_of(name) or "")
    kind = next((kind for suffix, kind in KINDS.items() if plain.endswith(suffix)), None)
    return kind if plain == lower or kind in (Kind.JSON, Kind.CSV) else None


def compression_of(name: str) -> str | None:
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), None)


def select(names: Iterable[str], *, evaluation: bool) -> Selection:
    """Choose the files of a folder.

    Args:
        names: of all its files, with those of its sub-folders as ``sub/name``.
        evaluation: whether evaluation rows are wanted rather than training rows, where the names tell them apart.

    Raises:
        RowFilesError: there are none, or files of no known kind, of several kinds, or of an unknown split.

    """
    everything = sorted(names)
    if len(everything) > MOST_FILES:
        raise RowFilesError(f"has {len(everything)} files; at most {MOST_FILES} are read: put more rows into each")
    if SPLITS in everything or STATE in everything:
        return _saved(everything, evaluation=evaluation)
    notes = tuple(name for name in everything if _is_note(name))
    rest = [name for name in everything if name not in set(notes)]
    if saved := next((name for name in rest if PurePosixPath(name).name in (STATE, SPLITS)), None):
        raise RowFilesError(f"has a dataset of datasets.save_to_disk inside it; name its folder, {_parent(saved)}")
    if not rest:
        raise RowFilesError(f"has no files in it; it {ALLOWED}")
    if unknown := [name for name in rest if kind_of(name) is None]:
        raise RowFilesError(f"has files that cannot be read as rows: {_shown(unknown)}. The source {ALLOWED}")
    chosen, others = _of_split(rest, evaluation=evaluation)
    kinds = sorted({str(kind_of(name)) for name in chosen})
    if len(kinds) > 1:
        raise RowFilesError(
            f"must hold files of one known type; it holds {_shown(chosen)} ({' and '.join(kinds)}). The source"
            f" {ALLOWED}"
        )
    return Selection(Kind(kinds[0]), tuple(chosen), notes, tuple(others))


def _saved(names: list[str], *, evaluation: bool) -> Selection:
    """Choose a dataset's files, of several splits those of one."""
    folder = ""
    if SPLITS in names:
        folders = [_parent(name) for name in names if PurePosixPath(name).name == STATE]
        wanted = _wanted_split({split: [split] for split in folders}, evaluation=evaluation)
        if wanted is None:
            purpose = "validation or test" if evaluation else "train"
            raise RowFilesError(
                f'has no split "{purpose}"; point at one of its folders: {", ".join(folders) or "none"}'
            )
        folder = wanted
    inside = [n for n in names if _parent(n) == folder and n.endswith((".arrow", ".json"))]
    mine = {*inside, *([SPLITS] if folder else [])}
    others = tuple(name for name in names if name not in mine and "/" in name)
    return Selection(Kind.SAVED, tuple(sorted(mine)), other_splits=others, folder=folder)


def _of_split(names: list[str], *, evaluation: bool) -> tuple[list[str], list[str]]:
    """(names that are wanted, those of other splits)."""
    by_split: dict[str | None, list[str]] = {}
    for name in names:
        by_split.setdefault(split_of(name), []).append(name)
    unassigned = by_split.pop(None, [])
    known = {split: files for split, files in by_split.items() if split is not None}
    if not known or (len(known) == 1 and (evaluation or (not unassigned and "train" in known))):
        return names, []
    if [*known] == ["train"]:  # as ``datasets`` does: the others may be rows to test with, whatever they are called
        return known["train"], unassigned
    wanted = _wanted_split(known, evaluation=evaluation)
    if len(known) == 1 and not unassigned:
        raise RowFilesError(
            f"has files of the split {next(iter(known))} alone ({_shown(names)}), and rows to train on are wanted; if "
            "they are meant, name the file, or give the files names without a split"
        )
    if unassigned or wanted is None:
        found = "; ".join(f"{split}: {_shown(files)}" for split, files in sorted(known.items()))
        more = f"; of no split: {_shown(unassigned)}" if unassigned else ""
        raise RowFilesError(f"has files of several splits ({found}{more}); name the file or folder that is meant")
    return known.pop(wanted), sorted(name for files in known.values() for name in files)


def _wanted_split(splits: dict[str, list[str]], *, evaluation: bool) -> str | None:
    return next((split for split in (("validation", "test") if evaluation else ("train",)) if split in splits), None)


def split_of(name: str) -> str | None:
    """Tell which split a path names, the outermost folder first; None where it names none."""
    for part in PurePosixPath(INNER_CAPITAL.sub("-", name).lower()).parts:
        if found := SPLIT_PATTERN.search(part):
            return found.lastgroup
    return None


def _is_note(name: str) -> bool:
    path = PurePosixPath(name.lower())
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    if hidden or path.suffix in NOTE_SUFFIXES or HUB_NOTE.fullmatch(path.name):
        return True
    return NOTE_NAMES.fullmatch(path.name) is not None and kind_of(name) is None


def _parent(name: str) -> str:
    parent = PurePosixPath(name).parent.as_posix()
    return "" if parent == "." else parent


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
