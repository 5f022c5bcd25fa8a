"""The tokenizer, with the job's chat template in place, within bounds of time and memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from qlora_trainer.bounds import Bounds, bounded
from qlora_trainer.errors import UserError
from qlora_trainer.storage.model_files import TOKENIZER_CONFIG

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
        UserError: transformers cannot make a tokenizer of these files, or does not have its class.

    """
    _check_class(path)
    try:
        with _errors_of_the_base():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # each kind of tokenizer checks its files in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise UserError(FIELD, None, f"has a tokenizer that cannot be loaded: {reason}") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # the code is not published with it, and never was run
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _check_class(path: Path) -> None:
    """Find out whether transformers itself has the class that a tokenizer names code for.

    Raises:
        UserError: it has not, and code of a base is never run.

    """
    file = path / TOKENIZER_CONFIG
    code = json.loads(file.read_bytes()).get("auto_map") if file.is_file() else None
    named = code.get("AutoTokenizer") if isinstance(code, dict) else code
    classes = [str(name).rpartition(".")[2] for name in (named if isinstance(named, list) else [named]) if name]
    if classes and not any(tokenizer_class_from_name(name) for name in classes):
        raise UserError(
            FIELD,
            None,
            f"has a tokenizer with its own code (auto_map in {TOKENIZER_CONFIG}: {json.dumps(code)}), which is never "
            "run; use a model whose tokenizer is built into transformers",
        )


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
