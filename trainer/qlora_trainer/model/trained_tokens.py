"""Tokens whose embeddings are trained, by PEFT's trainable token indices.

PEFT puts the trained rows into a copy of the whole table in each forward pass, and its gradient is as large. Here the
table stays as it is: a trained row takes the place of what the table gave, and its logit that of the head's where head
and embeddings are one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.nn import functional

from qlora_api.spec import LoRASpec
from qlora_trainer.errors import UserError
from qlora_trainer.model.composite import output_head_names
from qlora_trainer.model.tokenizer import load_tokenizer

FIELD = "spec.lora.trainTokens"
TRAINED_ROWS = ".token_adapter.trainable_tokens_delta"
"""In the name of the trained rows."""
SHOWN = 8
"""Pieces of a text that an error shows."""


def find_trained_tokens(
    path: Path, lora: LoRASpec, model_name: str, load: Callable[[Path], Any] = load_tokenizer
) -> dict[str, int]:
    """Return the numbers of the tokens that a job trains, by :func:`token_numbers`; nothing where it names none.

    Args:
        path: of the base.
        lora: of the job.
        model_name: by which errors name the base.
        load: loads a tokenizer.

    Raises:
        UserError: one is no single token of this tokenizer, or two are the same.

    """
    return token_numbers(lora.train_tokens, load(path), model_name) if lora.train_tokens else {}


def token_numbers(tokens: Iterable[str], tokenizer: Any, model_name: str) -> dict[str, int]:
    """Return the number of each token, in the order of the numbers.

    Args:
        tokens: names in the tokenizer's vocabulary, or texts that are one token of it.
        tokenizer: of the base.
        model_name: by which errors name the base.

    Raises:
        UserError: one is no single token of this tokenizer, or two are the same.

    """
    vocabulary = tokenizer.get_vocab()
    found: dict[int, str] = {}
    for token in tokens:
        number = vocabulary[token] if token in vocabulary else _number_of_text(token, tokenizer, model_name)
        if number in found:
            raise UserError(FIELD, token, f'is token {number} of {model_name}, as "{found[number]}" is: name it once')
        found[number] = token
    return {found[number]: number for number in sorted(found)}


def _number_of_text(text: str, tokenizer: Any, model_name: str) -> int:
    numbers: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(numbers) == 1 and tokenizer.decode(numbers, clean_up_tokenization_spaces=False) == text:
        return numbers[0]
    pieces = [json.dumps(piece, ensure_ascii=False) for piece in tokenizer.convert_ids_to_tokens(numbers[:SHOWN])]
    shown = ", ".join([*pieces, *(["…"] if len(numbers) > SHOWN else [])]) or "nothing"
    raise UserError(
        FIELD,
        text,
        f"is no single token of {model_name}, whose tokenizer makes {shown} of it: name tokens that the tokenizer has",
    )


def check_trained_tokens(model: Any, lora: LoRASpec, numbers: Mapping[str, int], model_name: str) -> None:
    """Find out whether the embeddings of tokens can be trained; works on a model without weights too.

    Raises:
        UserError: they cannot.

    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    kind = type(embeddings).__name__
    if not isinstance(embeddings, nn.Embedding) or not embeddings.weight.is_floating_point():
        raise _unavailable(f"whose embeddings are no plain table but {kind}", model_name)
    if type(embeddings).forward is not nn.Embedding.forward and not hasattr(embeddings, "embed_scale"):
        raise _unavailable(f"whose embeddings are computed in a way of their own ({kind})", model_name)
    rows = embeddings.weight.shape[0]
    for token, number in numbers.items():
        if number >= rows:
            raise UserError(
                FIELD, token, f"is token {number} of the tokenizer, and {model_name} has {rows} embeddings: it has none"
            )
    if head is None or head.weight is not embeddings.weight:
        return
    if type(head) is not nn.Linear or head.bias is not None:
        raise _unavailable("whose output head shares the embeddings and is no plain linear layer", model_name)
    for target in lora.target_modules or ():
        if any(f".{name}".endswith(f".{target}") for name in output_head_names(model)):
            raise UserError(
                FIELD,
                None,
                f"is not available with {target} in spec.lora.targetModules: the output head of {model_name} shares "
                "the embeddings, whose trained rows it learns with; leave out one of them",
            )


def _unavailable(reason: str, model_name: str) -> UserError:
    return UserError(FIELD, None, f"is not available for {model_name}, {reason}")


def use_trained_rows(model: Any, model_name: str) -> None:
    """Have the embeddings, and a head that shares them, take trained rows from the adapter.

    Raises:
        UserError: PEFT has left out a head that shares the embeddings.

    """
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    if not layers:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is embeddings.original_module.weight:
        raise _unavailable("whose output head shares the embeddings without saying so in its config.json", model_name)
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward, *_places(layer))


def _places(layer: TrainableTokensLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the trained row of each token, or -1, and the token of each trained row."""
    weight = layer.get_base_layer().weight
    (numbers,) = map(torch.tensor, layer.token_indices.values())
    rows = torch.full((weight.shape[0],), -1)
    rows[numbers] = torch.arange(len(numbers))
    return rows.to(weight.device), numbers.to(weight.device)


def _forward(
    layer: Any,
    peft: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    numbers: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return peft(x)
    base, trained = layer.get_base_layer(), layer.trainable_tokens_delta[layer.active_adapters[0]]
    out: torch.Tensor = base(x)
    if not isinstance(base, nn.Embedding):
        return out.index_copy(-1, numbers, functional.linear(x, trained))
    row = rows[x]
    embedded = functional.embedding(row.clamp(min=0), trained).to(out.dtype)
    scale = layer._get_embed_scale()  # noqa: SLF001 of PEFT, which has it so
    if scale is not None:
        embedded = embedded * scale.to(out.dtype)
    return torch.where((row >= 0).unsqueeze(-1), embedded, out)


def plain_head(model: Any) -> Any:
    """Return the output head itself, without what trains rows of it."""
    head = model.get_output_embeddings()
    return head.original_module if isinstance(head, TrainableTokensWrapper) else head


def trained_rows(head: Any) -> tuple[Any, torch.Tensor] | None:
    """Return the trained rows of an output head, by the adapter's name, and their tokens; None where it has none."""
    if not isinstance(head, TrainableTokensWrapper):
        return None
    layer = head.token_adapter
    return layer.trainable_tokens_delta, _places(layer)[1]


def trained_count(model: Any) -> int:
    """Return how many tokens have embeddings that are trained."""
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    return max((len(indices) for layer in layers for indices in layer.token_indices.values()), default=0)
