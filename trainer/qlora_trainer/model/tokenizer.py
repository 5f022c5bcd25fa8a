"""The tokenizer, with the job's chat template in place, within bounds of time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_trainer.bounds import Bounds, bounded
from qlora_trainer.errors import UserError

FIELD = "spec.model.source"


class BoundedTokenizer:
    """A tokenizer whose calls are within bounds, and whose panics are errors of the base."""

    def __init__(self, tokenizer: Any, bounds: Bounds) -> None:
        self._tokenizer = tokenizer
        self._bounds = bounds

    def __call__(self, *texts: Any, **options: Any) -> Any:
        with bounded(self._bounds), _errors_of_the_base():
            return self._tokenizer(*texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)


def load_tokenizer(path: Path, chat_template: str | None = None) -> Any:
    """Return the base model's tokenizer; a chat template of the job's own replaces the tokenizer's.

    Raises:
        UserError: transformers cannot make a tokenizer of these files.

    """
    try:
        with _errors_of_the_base():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # each kind of tokenizer checks its files in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise UserError(FIELD, None, f"has a tokenizer that cannot be loaded: {reason}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_bounded_tokenizer(path: Path, chat_template: str | None = None, bounds: Bounds | None = None) -> Any:
    """:func:`load_tokenizer`, for a process that may be ended: loading and every call are within bounds."""
    bounds = bounds or Bounds()
    with bounded(bounds):
        tokenizer = load_tokenizer(path, chat_template)
    return BoundedTokenizer(tokenizer, bounds)


@contextmanager
def _errors_of_the_base() -> Iterator[None]:
    """Turn a panic of the tokenizers' Rust, whose class is in no module and no Exception, into an error of the base.

    Raises:
        UserError: there was one, such as that of an expression that takes exponential time.

    """
    try:
        yield
    except MemoryError:
        raise UserError(
            FIELD, None, "has a tokenizer that takes too much memory for some rows, or to be loaded"
        ) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(FIELD, None, "has a tokenizer whose library fails on a text") from None  # which it may quote
