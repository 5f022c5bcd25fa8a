"""A conversion under way: the settings of another tool, the fields they become, and what they do not become."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.kube.errors import ClusterError
from qlora_cli.manifest.local_paths import is_here

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Conversion:
    """Hold what becomes of one configuration.

    A setting that is read, or named as not needed, is done with. :meth:`finish` notes all others, so that nothing of a
    configuration gets lost without a word.

    Args:
        tool: name of the other tool.
        settings: of its configuration, by name.
        gpus: number of GPUs that it ran on.

    """

    def __init__(self, tool: str, settings: Mapping[str, Any], gpus: int) -> None:
        self.tool, self.gpus = tool, gpus
        self.fields: dict[str, object] = {}
        """Values by path below ``spec``."""
        self.notes: list[str] = []
        """Sentences on what was not, or not exactly, converted."""
        self._settings = settings
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, or the other tool's default where it is not set or null."""
        self._read.add(name)
        value = self._settings.get(name)
        return default if value is None else value

    def text(self, name: str, default: str = "") -> str:
        return str(self.get(name, default)).strip()

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a setting that is true or false.

        Raises:
            ClusterError: it is something else.

        """
        value = self.get(name, default)
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        found = words.get(str(value).strip().lower())
        if found is None:
            raise ClusterError(f"{self.tool}: {name}: {value!r} must be true or false")
        return found

    def number(self, name: str, default: float) -> float:
        """Return a setting that is a number.

        Raises:
            ClusterError: it is something else.

        """
        value = self.get(name, default)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ClusterError(f"{self.tool}: {name}: {value!r} must be a number")
        return number

    def names(self, name: str) -> list[str]:
        """Return a setting that is a list of names, or a text with commas between them."""
        value = self.get(name, [])
        parts = value if isinstance(value, list) else str(value).split(",")
        return [part for item in parts if (part := str(item).strip())]

    def put(self, path: str, value: object) -> None:
        self.fields[path] = value

    def put_decimal(self, path: str, name: str, default: float | None = None) -> None:
        """Set a decimal field, which is a text in the manifest, from a setting; without one it keeps its default."""
        if (value := self.get(name, default)) is None:
            return
        self.number(name, 0)
        try:
            self.put(path, f"{Decimal(str(value).strip()).normalize():f}")
        except InvalidOperation:
            raise ClusterError(f"{self.tool}: {name}: {value!r} must be a number") from None

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def not_needed(self, *names: str) -> None:
        """Leave out settings that change nothing of what is learned."""
        self._read.update(names)

    def refuse_unless(self, allowed: Iterable[str], name: str, default: str, why: str) -> str:
        """Return a setting that decides whether there is anything to convert.

        Raises:
            ClusterError: it has another value.

        """
        value = self.text(name, default).lower()
        allowed = tuple(allowed)
        if value not in allowed:
            raise ClusterError(f"{self.tool}: {name}: {value!r} {why}; must be {' or '.join(allowed)}")
        return value

    def finish(self) -> None:
        """Note all settings that were not looked at and say something."""
        for name, value in self._settings.items():
            if name not in self._read and value not in (None, False, "", [], {}):
                self.note(f"{name}: {_shown(value)}: has no counterpart")


def source_of(place: str, revision: str = "") -> str:
    """Return a model or a dataset as a manifest names it: ``org/name`` that is no path here is on the Hub."""
    if "://" in place or place.startswith(("/", "./", "../", "~")) or is_here(Path(place)) or place.count("/") > 1:
        return place
    return f"hf://{place}{f'@{revision}' if revision else ''}"


def _shown(value: object) -> str:
    words = str(value)
    return words if len(words) <= 60 else f"{words[:57]}…"
