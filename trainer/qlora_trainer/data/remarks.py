"""Remarks about rows that are learned: counted row by row, and told in the notes of the receipt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qlora_trainer.data.rows.place import RowPlace

OTHER_ROLES = (
    "have messages of a role other than assistant, developer, system, tool and user, which the chat template does not"
    " name: these messages are context and not learned"
)


@dataclass
class Remarks:
    """Remarks about the rows of one source. Each completes "N rows …"."""

    found: dict[str, tuple[int, RowPlace]] = field(default_factory=dict)
    """Remark → number of rows, and the first of them."""

    def add(self, remarks: Iterable[str], place: RowPlace) -> None:
        """Count one row."""
        for remark in remarks:
            count, first = self.found.get(remark, (0, place))
            self.found[remark] = (count + 1, first)

    def notes(self) -> list[str]:
        """Return a sentence for each remark."""
        return [
            f"{count} {'row' if count == 1 else 'rows'} {remark}; the first is row {first}"
            for remark, (count, first) in sorted(self.found.items())
        ]
