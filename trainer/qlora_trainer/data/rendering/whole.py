"""Conversations of which all is learned, but what has weight 0 and what would teach silence. Light to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_trainer.data.rendering.compiled_template import Message
from qlora_trainer.data.rendering.message_texts import count_written, says_anything
from qlora_trainer.data.rendering.rendered import Rendered
from qlora_trainer.data.rendering.turns import TemplateRefusedError

Write = Callable[[list[Message]], str]
"""Renders messages with a template."""


def render_whole(write: Write, messages: list[Message], learned: Sequence[bool]) -> Rendered:
    """Return the whole conversation as one example.

    Args:
        write: renders messages.
        messages: of the conversation.
        learned: False for each message that may not be learned. One of the assistant of which nothing is written is
            not learned either.

    Raises:
        TemplateRefusedError: the text of one of these cannot be told from what follows.
        Exception: what the template raises.

    """
    whole = write(messages)
    written = count_written(messages, whole)
    done = Rendered([], left_out=sum(missing > 0 for _, missing in written))
    silent = {
        place
        for place, message in enumerate(messages)
        if learned[place]
        and message["role"] == "assistant"
        and _is_silent(write, messages, place, whole, done.left_out)
    }
    done.empty = len(silent)
    example, at = [], 0
    for place in (place for place, counts in enumerate(learned) if not counts or place in silent):
        part = _part(write, messages, place, whole)
        if part is None or part[0] < at:
            if not learned[place]:
                raise _inseparable(place)
            if _is_dropped(write, messages, place, whole):
                continue
            return done  # learned as a whole, it would teach silence
        begin, end = part
        if not learned[place] and count_written([messages[place]], whole[begin:end])[0][1]:
            raise _inseparable(place)
        example += [(whole[at:begin], True), (whole[begin:end], False)]
        at = end
    done.examples = [[*example, (whole[at:], True)]]
    return done


def _inseparable(place: int) -> TemplateRefusedError:
    return TemplateRefusedError(
        f"writes message {place + 1}, which has weight 0, otherwise once others follow, so that its text cannot be left"
        " out of what is learned: with lossOn All, leave weight away, or set lossOn to Assistant"
    )


def _is_silent(write: Write, messages: list[Message], place: int, whole: str, missing: int) -> bool:
    """Return whether nothing that the message says is written where it stands."""
    if not says_anything(messages[place]):
        return True
    if not missing:
        return False
    try:
        part = _part(write, messages, place, whole)
    except Exception:  # noqa: BLE001 it may not like to end there
        return False
    return part is not None and part[0] < part[1] and not count_written([messages[place]], whole[slice(*part)])[0][0]


def _part(write: Write, messages: list[Message], place: int, whole: str) -> tuple[int, int] | None:
    """Find where a message begins and ends in the whole; None if that cannot be told."""
    before = write(messages[:place]) if place else ""
    with_it = write(messages[: place + 1])
    return (len(before), len(with_it)) if whole.startswith(with_it) and with_it.startswith(before) else None


def _is_dropped(write: Write, messages: list[Message], place: int, whole: str) -> bool:
    """Return whether the whole has nothing of a message, not even that there is one."""
    try:
        return write([*messages[:place], *messages[place + 1 :]]) == whole
    except Exception:  # noqa: BLE001 it may want this message where it is
        return False
