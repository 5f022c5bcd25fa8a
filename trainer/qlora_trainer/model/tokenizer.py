"""The tokenizer, with the job's chat template in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_trainer.errors import UserError


def load_tokenizer(path: Path, chat_template: str | None = None) -> Any:
    """The base model's tokenizer; a chat template of the job's own replaces the tokenizer's.

    Raises:
        UserError: transformers cannot make a tokenizer of these files.

    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer checks its files in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise UserError("spec.model.source", None, f"has a tokenizer that cannot be loaded: {reason}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
