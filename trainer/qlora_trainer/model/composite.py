"""Language models inside a class that also takes images or sound, such as ``Gemma3ForConditionalGeneration``.

The language model is trained, under the names that it has in that class: PEFT and vLLM look for the adapter's layers
there. What else the class has, its towers, is neither loaded nor adapted. No model type is named here: the language
model is the module that has the input embeddings.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

_COMPOSITE = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
_GRIDS = 3
"""Positions of a token in time, height and width (``mrope_section`` of a configuration)."""


def text_config(config: Any) -> Any:
    """Return the configuration of the language model, which is the whole one where there is nothing else."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # it has several
        return config


def model_class(config: Any) -> Any:
    """Return the class of a base, of which transformers knows several for some; None where it is no language model."""
    auto = _auto_class(config)
    return None if auto is None else auto._model_mapping[type(config)]  # noqa: SLF001 the public way loads the weights


def _auto_class(config: Any) -> Any:
    """Return the auto class that finds the class which the base was saved as, or else the one for most inputs."""
    is_text = text_config(config) is config
    order = (AutoModelForCausalLM, *_COMPOSITE) if is_text else (*_COMPOSITE, AutoModelForCausalLM)
    found = {auto: auto._model_mapping[type(config)] for auto in order if type(config) in auto._model_mapping}  # noqa: SLF001
    named = [auto for auto, kind in found.items() if kind.__name__ in (config.architectures or ())]
    return next(iter([*named, *found]), None)


def trained_class(config: Any) -> Any:
    """Return what a base is loaded with to be trained: its class, of a composite one without towers."""
    if text_config(config) is config:
        return model_class(config)
    auto = _auto_class(config)
    # AutoModelForCausalLM has the text classes of composite configurations.
    return auto if auto is AutoModelForCausalLM else without_towers(model_class(config))


def meta_model_of(config: Any, *, whole: bool = False, dtype: torch.dtype | None = None) -> Any:
    """Return the architecture without weights, as it is trained or as it was published."""
    with torch.device("meta"):
        return new_model(config, whole=whole, dtype=dtype)


def new_model(config: Any, *, whole: bool = False, dtype: torch.dtype | None = None) -> Any:
    """Return a model with the weights that its class begins with, as it is trained or as it was published."""
    kind = _auto_class(config) if whole else trained_class(config)
    build = kind.from_config if hasattr(kind, "_model_mapping") else kind._from_config  # noqa: SLF001
    return build(config) if dtype is None else build(config, dtype=dtype)


def without_towers(kind: Any) -> Any:
    """Return a class of the same name whose models have no towers, and compute what ``kind`` does for text alone."""

    def build(self: Any, config: Any, *more: Any, **named: Any) -> None:
        kind.__init__(self, config, *more, **named)
        if self.get_output_embeddings() is None and (owner := _owner_of_head(self)) is not None:
            self.get_output_embeddings = owner.get_output_embeddings  # which everybody asks
        remove_towers(self)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def language_model(model: nn.Module) -> tuple[str, Any]:
    """Return the name and module of the language model: the one that has the input embeddings."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    name = next((n for n, module in model.named_modules() if module is embeddings), "").rpartition(".")[0]
    return name, model.get_submodule(name)


def output_head_names(model: nn.Module) -> list[str]:
    """Return the name of the output head; nothing where a model has none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if module is head]


def _owner_of_head(model: nn.Module) -> Any:
    """Return the module around the language model that has the output head of a class that names none."""
    path = language_model(model)[0].split(".")
    around: list[Any] = [model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path))]
    heads = [m for m in around if hasattr(m, "get_output_embeddings") and m.get_output_embeddings() is not None]
    return next(iter(heads), None)


def tower_names(model: nn.Module) -> list[str]:
    """Return the outermost modules beside the language model and the output head."""
    kept = [language_model(model)[0], *output_head_names(model)]
    if "" in kept:
        return []
    ancestors = {".".join(name.split(".")[:depth]) for name in kept for depth in range(name.count(".") + 1)}
    children = [
        f"{parent}.{child}" if parent else child
        for parent in sorted(ancestors)
        for child, _ in model.get_submodule(parent).named_children()
    ]
    return [name for name in children if name not in ancestors and name not in kept]


def remove_towers(model: Any) -> None:
    """Leave the towers out, remember the names of their layers, and call the language model by itself."""
    names = tower_names(model)
    model.tower_layers = [f"{t}.{n}".rstrip(".") for t in names for n, _ in model.get_submodule(t).named_modules()]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    gone = tuple(f"{name}." for name in names)
    tied = {a: b for a, b in model.all_tied_weights_keys.items() if not (a.startswith(gone) or b.startswith(gone))}
    model.all_tied_weights_keys = tied
    patterns = {rf"^{re.escape(name)}\." for name in names}
    model._keys_to_ignore_on_load_unexpected = patterns | set(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001
    _use_text_alone(model)


def has_no_towers(model: Any) -> bool:
    """Return whether the towers of a model were left out."""
    return hasattr(model, "tower_layers")


def tower_layers(model: Any) -> list[str]:
    """Return the full names of all modules of the towers that were left out."""
    names: list[str] = getattr(model, "tower_layers", [])
    return names


def _use_text_alone(model: Any) -> None:
    """Have the modules between the model and its language model pass text through, which some prepare for images."""
    name, inner = language_model(model)
    if getattr(inner.config, "rope_parameters", None) and "mrope_section" in inner.config.rope_parameters:
        inner.register_forward_pre_hook(_with_grids, with_kwargs=True)
    heads = output_head_names(model)
    path = name.split(".")
    between = [".".join(path[:depth]) for depth in range(1, len(path))]
    wrappers = [outer for outer in between if not any(head.startswith(f"{outer}.") for head in heads)]
    if wrappers:
        model.get_submodule(wrappers[0]).forward = _TextForward(inner)


class _TextForward:
    """The forward pass of a module that wraps a language model, without anything but text."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *arguments: Any, **named: Any) -> _TextOutput:
        out = self.inner(*arguments, **{name: value for name, value in named.items() if value is not None})
        return _TextOutput(**out)


class _TextOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """An output that has nothing of images, whatever that is called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _with_grids(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give positions as these models want them where rows lie end to end: [1 + grids, batch, T]."""
    positions = named.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.ndim == 2:
        named = {**named, "position_ids": positions.expand(1 + _GRIDS, *positions.shape)}
    return arguments, named
