"""A message of the assistant that begins in the prompt and goes on in the completion. Light to import."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_trainer.data.rendering.compiled_template import Message
from qlora_trainer.data.rendering.message_texts import says_anything
from qlora_trainer.data.rendering.turns import TemplateRefusedError, Turn


@dataclass(frozen=True)
class Continued:
    """A conversation in which both parts are one message."""

    messages: list[Message]
    learned: list[bool]
    place: int
    """Index of the shared message in ``messages``."""
    beginning: str
    """Its text in the prompt."""
    text: str
    """All of its text."""

    @classmethod
    def of(cls, messages: list[Message], learned: list[bool], place: int) -> Continued | None:
        """Join message ``place`` to the one before; None where it has nothing to go on with, or ``place`` is 0.

        Args:
            messages: of prompt and completion.
            learned: for each message.
            place: of the first message of the completion.

        """
        if not place or not says_anything(messages[place]):
            return None
        first, second = messages[place - 1], messages[place]
        text = first["content"] + (second.get("content") or "")
        return cls(
            [*messages[: place - 1], {**first, **second, "content": text}, *messages[place + 1 :]],
            [*learned[: place - 1], *learned[place:]],
            place - 1,
            first["content"],
            text,
        )

    def cut(self, turn: Turn) -> Turn:
        """Return a turn without the beginning of this message, which is context.

        Raises:
            TemplateRefusedError: the text of the message is not written as it is.

        """
        if turn.message != self.place:
            return turn
        text = self.text if self.text in turn.written else self.text.strip()
        at = turn.written.rfind(text)
        if at < 0:
            raise TemplateRefusedError(
                f"changes the text of message {self.place + 1}, which begins in the prompt and goes on in the"
                " completion, so that what is learned of it cannot be told: give the whole message in the completion"
            )
        cut = at + max(0, len(self.beginning) - self.text.index(text))
        return replace(turn, context=turn.context + turn.written[:cut], written=turn.written[cut:])
