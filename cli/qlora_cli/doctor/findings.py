"""Findings of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; jobs run all the same."""
    FAULT = "fault"
    """Jobs do not run, or some do not."""
    UNKNOWN = "unknown"
    """You may not look."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    check: str
    text: str
    remedy: str = ""
    """Remedy; never empty for a fault."""

    def to_json_dict(self) -> dict[str, Any]:
        return {"level": self.level.value, "check": self.check, "text": self.text, "remedy": self.remedy}


def ok(check: str, text: str) -> Finding:
    return Finding(Level.OK, check, text)


def note(check: str, text: str, remedy: str = "") -> Finding:
    return Finding(Level.NOTE, check, text, remedy)


def fault(check: str, text: str, remedy: str) -> Finding:
    return Finding(Level.FAULT, check, text, remedy)


def unknown(check: str, text: str) -> Finding:
    return Finding(Level.UNKNOWN, check, text)


_MARKS = {
    Level.OK: ("✓", "green"),
    Level.NOTE: ("•", "yellow"),
    Level.FAULT: ("✗", "bold red"),
    Level.UNKNOWN: ("?", "dim"),
}
_LABEL = 14


def lines(findings: Iterable[Finding]) -> Iterator[Text]:
    """Yield a line for each, its remedy under it."""
    for finding in findings:
        mark, style = _MARKS[finding.level]
        yield Text.assemble((f"{mark} ", style), (f"{finding.check:<{_LABEL}}", "dim"), finding.text)
        if finding.remedy:
            yield Text(f"  {'':<{_LABEL}}→ {finding.remedy}")


def summary(findings: Iterable[Finding]) -> str:
    counts = dict.fromkeys(Level, 0)
    for finding in findings:
        counts[finding.level] += 1
    if not counts[Level.FAULT]:
        hidden = f"; {counts[Level.UNKNOWN]} things you may not look at" if counts[Level.UNKNOWN] else ""
        return f"nothing keeps jobs from running{hidden}"
    return f"{counts[Level.FAULT]} fault{'s' if counts[Level.FAULT] > 1 else ''}"
