"""Texts to tokens with one tokenizer: apart from each other, first in an example or in the midst of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", "a", "=", "0")
"""Texts to put before one that is not the first, so that a tokenizer does not take it for the first."""


@dataclass(frozen=True)
class TextTokens:
    """Tokens of texts, without the special ones that the tokenizer itself adds."""

    tokenizer: PreTrainedTokenizerBase

    def of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts, each by itself."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # of rows longer than the model: maxLength is what counts here
        )["input_ids"]
        return ids

    def of_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Return the tokens of texts, each with whether it is the first of its example."""
        tokens = self.of_texts([text if first else self._anchor + text for text, first in pieces])
        if not self._anchor:
            return tokens
        return [
            ids if first else self._without_anchor(ids, text) for ids, (text, first) in zip(tokens, pieces, strict=True)
        ]

    def begun(self, ids: list[int]) -> list[int]:
        """Return tokens with those that stand first; rows that bring them as text do not get them twice."""
        return ids if ids[: len(self._begin)] == self._begin else self._begin + ids

    @cached_property
    def _begin(self) -> list[int]:
        """The tokens that the tokenizer itself puts before a text: a begin token, or what else the model is used to."""
        text: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole: list[int] = self.tokenizer("a")["input_ids"]
        starts = (at for at in range(len(whole)) if whole[at : at + len(text)] == text)
        return whole[: next(starts, 0)]

    @cached_property
    def _anchor(self) -> str:
        """Return a text to put before one that is not the first; empty where that makes no difference."""
        for anchor, alone in self._anchors.items():
            text, both = self.of_texts(["b", f"{anchor}b"])
            if both[: len(alone)] == alone and len(both) > len(alone):
                return anchor if both[len(alone) :] != text else ""
        return ""

    @cached_property
    def _anchors(self) -> dict[str, list[int]]:
        """The tokens of each anchor."""
        return dict(zip(ANCHORS, self.of_texts(ANCHORS), strict=True))

    def _without_anchor(self, ids: list[int], text: str) -> list[int]:
        """The tokens of a text in the midst of another, given those with the usual anchor before it."""
        for anchor in (self._anchor, *ANCHORS):
            if anchor != self._anchor:  # the text begins with what merges with the usual one
                ids = self.of_texts([anchor + text])[0]
            alone = self._anchors[anchor]
            if ids[: len(alone)] == alone:
                return ids[len(alone) :]
        return self.of_texts([text])[0]
