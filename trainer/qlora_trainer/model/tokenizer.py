"""The tokenizer, with the job's chat template in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(path: Path, chat_template: str | None = None) -> Any:
    """The base model's tokenizer; a chat template of the job's own replaces the tokenizer's."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
