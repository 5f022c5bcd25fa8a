"""Summarize the rows, so that a person can see what will be learned before a GPU is paid for."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_trainer.data.tokenized_rows import TokenizedRows

SAMPLES = 3
SAMPLE_TOKENS = 512
"""Tokens of a sample row: of a longer row the receipt shows the beginning and the end, half of the tokens each."""

COUNTED = "⟦", "⟧"


def samples(rows: TokenizedRows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Render the first, the middle and the last row, what counts for the loss between ⟦ and ⟧."""
    chosen = sorted({round(part * (len(rows) - 1) / (SAMPLES - 1)) for part in range(SAMPLES)})
    return [render_sample(*_as_lists(rows, index), tokenizer) for index in chosen]


def render_sample(tokens: list[int], targets: list[bool], tokenizer: PreTrainedTokenizerBase) -> str:
    """Render one row, special tokens included."""
    if len(tokens) <= SAMPLE_TOKENS:
        return _marked(tokens, targets, tokenizer)
    half = SAMPLE_TOKENS // 2
    left_out = len(tokens) - 2 * half
    begin = _marked(tokens[:half], targets[:half], tokenizer)
    end = _marked(tokens[-half:], targets[-half:], tokenizer)
    return f"{begin} … {left_out} tokens … {end}"


def _marked(tokens: list[int], targets: list[bool], tokenizer: PreTrainedTokenizerBase) -> str:
    text = ""
    for counted, run in groupby(zip(tokens, targets, strict=True), key=lambda pair: pair[1]):
        decoded = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        text += decoded.join(COUNTED) if counted else decoded
    return text


def _as_lists(rows: TokenizedRows, index: int) -> tuple[list[int], list[bool]]:
    tokens, targets = rows.row(index)
    return tokens.tolist(), targets.tolist()
