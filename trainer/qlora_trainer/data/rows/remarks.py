"""Remarks about rows that are learned: counted row by row, and told in the notes of the receipt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qlora_trainer.data.rows.place import RowPlace

MOST_REMARKS = 32
OTHER_ROLES = (
    "messages of a role other than assistant, developer, system, tool and user, which the chat template does not name,"
    " are context and not learned"
)
HALF_AN_EXCHANGE = (
    "messages as JSON text in only one of prompt and completion are given to the model as the text that they are"
)
CONTINUED = "completions go on with the message of the assistant that ends the prompt: its text is context"
NOT_CONTINUED = (
    "messages of the assistant that end a prompt are closed, and the completion begins another one: they are the only"
    " message, or call tools, or the completion begins with reasoning"
)
SYSTEM_COLUMN = "texts in the column {column} are given as the system message"
SYSTEM_UNUSED = (
    "cells of the column {column} are not used: they hold no text, or the messages begin with another system message,"
    " or the row has no messages"
)
FUNCTIONS_UNUSED = "cells of the column functions are not used: they hold no functions with names, or the row has tools"
TOOLS_UNUSED = "cells of the column {column} are not used: the row has no messages"
UNREAD_KEY = "keys {key} of messages, which the chat template does not name, have no effect"
UNWRITTEN = "characters for which the tokenizer has no token are neither read nor learned (counted as leftOut)"


@dataclass
class Remarks:
    """Remarks about the rows of one source. Each is about something in them, in the plural."""

    found: dict[str, tuple[int, RowPlace]] = field(default_factory=dict)
    """Remark → number of rows, and the first of them."""

    def add(self, remarks: Iterable[str], place: RowPlace) -> None:
        """Count one row."""
        for remark in remarks:
            if remark not in self.found and len(self.found) >= MOST_REMARKS:
                continue
            count, first = self.found.get(remark, (0, place))
            self.found[remark] = (count + 1, first)

    def notes(self) -> list[str]:
        """Return a sentence for each remark."""
        return [
            f"{remark} (rows with them: {count}, the first is row {first})"
            for remark, (count, first) in sorted(self.found.items())
        ]
