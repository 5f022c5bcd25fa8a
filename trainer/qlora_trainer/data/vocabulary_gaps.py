"""Characters for which a tokenizer has no token: it leaves them out, or writes its unknown token in their place.

Only tokenizers without bytes among their tokens have such. Nobody can learn to write these characters, so an unknown
token is no target, and a text of which nothing is left is not learned, its end included: that would teach silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from qlora_trainer.data.text_pieces import Piece, is_blank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROBES = ("𐎀", "𒀀", "ꡀ", "🜨")
"""Characters of scripts that hardly a vocabulary has: who writes these has bytes among its tokens."""


@dataclass(frozen=True)
class ExampleTargets:
    """Target tokens of an example."""

    of_pieces: list[list[bool]]
    gaps: bool = False
    """Characters of it have no token."""
    silent: int = 0
    """Texts that were to be learned and of which nothing is left."""


@dataclass(frozen=True)
class VocabularyGaps:
    """Finds what a tokenizer cannot write.

    Args:
        tokenize: texts to tokens, without special ones.
        decode: tokens to text.
        unknown: the unknown token, as id and text; None if there is none.
        added: texts of tokens that are found before others, whatever their characters.

    """

    tokenize: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    unknown: tuple[int, str] | None
    added: Sequence[str] = ()
    _written: dict[str, bool] = field(default_factory=dict)
    """Characters that were met, and whether they have tokens."""

    def targets(self, example: Sequence[Piece], ids: Sequence[list[int]]) -> ExampleTargets:
        """Return which tokens count of texts that were tokenized apart."""
        if not self._exist:
            pairs = zip(example, ids, strict=True)
            return ExampleTargets([[piece.counts] * len(tokens) for piece, tokens in pairs])
        found, silent, gaps, mute = [], 0, False, False
        for piece, tokens in zip(example, ids, strict=True):
            gap = self._has_gap(piece.text, tokens)
            nothing = gap and is_blank(self.decode([token for token in tokens if not self._is_unknown(token)]))
            mute = piece.counts and (mute or nothing)  # up to the next context
            silent += piece.counts and nothing
            gaps |= gap
            found.append([piece.counts and not mute and not (gap and self._is_unknown(token)) for token in tokens])
        return ExampleTargets(found, gaps, silent)

    @cached_property
    def _exist(self) -> bool:
        unknown = any(map(self._is_unknown, chain.from_iterable(self.tokenize(PROBES))))
        return unknown or not all(self._are_written(PROBES))

    @cached_property
    def _added(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in sorted(self.added, key=len, reverse=True)) or "(?!)")

    def _are_written(self, characters: Sequence[str]) -> list[bool]:
        """Return for each character whether it has tokens in a word; that it is unknown there tells of no text."""
        alone, *words = self.tokenize(["a", *(f"a{character}" for character in characters)])
        return [word != alone for word in words]

    def _is_unknown(self, token: int) -> bool:
        return self.unknown is not None and token == self.unknown[0]

    def _has_gap(self, text: str, tokens: list[int]) -> bool:
        if self.unknown is not None and tokens.count(self.unknown[0]) > text.count(self.unknown[1]):
            return True
        characters = set(self._added.sub("", text))
        if new := [character for character in characters - self._written.keys() if not is_blank(character)]:
            self._written.update(zip(new, self._are_written(new), strict=True))
        return not all(self._written.get(character, True) for character in characters)
