"""Report the progress of loading a model, as transformers counts its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.logging import set_tqdm_hook

LOADING = "Loading weights"
"""Title of transformers' progress bar for reading a model's weights, each of which it also quantizes."""


@contextmanager
def counted_weights(count: Callable[[Collection[Any], int, str], Iterable[Any]]) -> Iterator[None]:
    """Pass the weights of models that are loaded within through ``count``, with their number and what they are."""

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != LOADING:
            return factory(*args, **kwargs)
        return count(args[0], len(args[0]), "weights")

    before = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(before)
