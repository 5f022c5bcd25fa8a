"""Keep the answers of a run's base, adapter and merged model beside the run, for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_storage.local_paths import read_regular, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FILE = "answers.jsonl"
MOST = 100


class AnswerLine(BaseModel):
    """One line of the trainer's output."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str
    base: str | None = None
    adapter: str | None = None
    merged: str | None = None


def kept(folder: Path) -> list[AnswerLine]:
    """Return the answers of a run, each prompt once, the oldest first. What cannot be read is left out."""
    try:
        lines = read_regular(folder / FILE).decode(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(AnswerLine.model_validate_json(line))
        except ValidationError:
            continue
    return found


def keep(folder: Path, answers: Iterable[AnswerLine]) -> None:
    """Lay answers beside a run; one to the same prompt takes the earlier one's place."""
    every: dict[str, AnswerLine] = {}
    for answer in (*kept(folder), *answers):
        every.pop(answer.prompt, None)
        every[answer.prompt] = answer
    text = "".join(answer.model_dump_json() + "\n" for answer in [*every.values()][-MOST:])
    write_whole(folder / FILE, text)
