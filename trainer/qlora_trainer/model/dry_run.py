"""A forward and backward pass without data or weights: how each linear layer is used, and which adapters would learn.

Shapes and the graph are followed on the meta device. A model that cannot run there, since it decides by values, is not
judged; one that fails for another reason would fail in training, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx.experimental import _config as fx_config  # torch's message of nonzero on the meta device names it
from transformers.pytorch_utils import Conv1D

from qlora_trainer.errors import UserError
from qlora_trainer.model.experts.forward import use_own_forward
from qlora_trainer.model.layer_use import LayerUse
from qlora_trainer.model.trained_tokens import TRAINED_ROWS

if TYPE_CHECKING:
    from qlora_api.spec import LoRASpec

TOKENS = 8
_nonzero_is_known = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
"""Indices of what is chosen by values are those of all: a gradient then reaches what it can reach."""
log = logging.getLogger(__name__)


def find_layer_use(skeleton: Any) -> LayerUse:
    """Return how the linear layers of a base are used in training.

    Args:
        skeleton: the base on the meta device, without an adapter; afterwards of use for names and shapes alone.

    """
    use_own_forward(skeleton)
    layers = {n: m for n, m in skeleton.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    head = skeleton.get_output_embeddings()
    reached: set[str] = set()
    needs = {name: p.requires_grad for name, p in skeleton.named_parameters()}
    skeleton.requires_grad_(requires_grad=True)
    try:
        with _watched(layers, reached) as read:
            if not _try(skeleton):
                return LayerUse()
    finally:
        for name, parameter in skeleton.named_parameters():
            parameter.requires_grad_(needs[name])
            parameter.grad = None
    own = {n for n, m in layers.items() if m is not head}
    return LayerUse(read=frozenset(read & own), idle=frozenset(own - reached))


@contextmanager
def _watched(layers: dict[str, nn.Module], reached: set[str]) -> Iterator[set[str]]:
    """Collect the layers whose weight is read by another module than themselves, and those that a gradient reaches."""
    read: set[str] = set()
    inside: list[nn.Module] = []
    classes = {name: type(layer) for name, layer in layers.items()}

    def note(layer: Any, name: str, own: str) -> Any:
        if name == "weight" and layer not in inside:
            read.add(own)
        return nn.Module.__getattr__(layer, name)

    def forward(layer: Any, own: str, *arguments: Any, **named: Any) -> Any:
        inside.append(layer)
        try:
            out = classes[own].forward(layer, *arguments, **named)
        finally:
            inside.pop()
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.register_hook(lambda _: reached.add(own))  # type: ignore[no-untyped-call]
        return out

    try:
        for name, layer in layers.items():
            layer.__class__ = type(
                classes[name].__name__,
                (classes[name],),
                {
                    "__getattr__": lambda self, attribute, own=name: note(self, attribute, own),
                    "forward": lambda self, *a, own=name, **k: forward(self, own, *a, **k),
                },
            )
        yield read
    finally:
        for name, layer in layers.items():
            layer.__class__ = classes[name]


def adapters_without_gradient(model: Any) -> list[str]:
    """Return the adapted layers that no gradient reaches, such as those of an image tower; empty where all learn.

    Args:
        model: the base without weights, with its adapter; its gradients are left behind.

    """
    use_own_forward(model.get_base_model())
    if not _try(model):
        return []
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    lost = {n.split(end)[0] for end in (".lora_B.", f"{TRAINED_ROWS}.") for n in idle if end in n}
    return sorted(n.removeprefix("base_model.model.") for n in lost)


def idle_layers_error(names: list[str], lora: LoRASpec, model_name: str) -> UserError:
    """Return the error of a job whose adapter is on layers that would not learn."""
    kinds = ", ".join(sorted({".".join(name.rsplit(".", 2)[-2:]) for name in names}))
    named = ", ".join(lora.target_modules or ()) or None
    return UserError(
        "spec.lora.targetModules",
        named,
        f"would adapt layers of {model_name} that no gradient reaches: {kinds}; name the others",
    )


def check_takes_text(whole: Any) -> None:
    """Find out whether the class that serves a base computes logits of text alone.

    Args:
        whole: the base on the meta device with all its towers; of no other use afterwards.

    Raises:
        UserError: it wants images or sound.

    """
    _try(whole)


def _try(model: Any) -> bool:
    """Go forward and backward; return whether that is possible without values.

    Raises:
        UserError: it is not possible with values either.

    """
    was_training = model.training
    model.train()
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")  # its values would tell what a mask of two dimensions means
    failures: list[Exception] = []
    for extra in ({"attention_mask": mask}, {}):
        try:
            _run(model, **extra)
        except Exception as error:  # noqa: BLE001 each class fails without values in its own way
            failures.append(error)
            continue
        model.train(was_training)
        return True
    words = f"{type(failures[-1]).__name__}: {' '.join(str(failures[-1]).split())[:300]}"
    if not any(_lacks_values(error) for error in failures):
        raise UserError(
            "spec.model.source",
            None,
            f"is of a class that cannot be trained on text alone; its forward pass ends in {words}",
        )
    log.info("the base cannot be tried without weights: %s", words)
    return False


def _lacks_values(error: Exception) -> bool:
    """Return whether a failure may come of the meta device, whose tensors have no values."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def _run(model: Any, **extra: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    with _nonzero_is_known, torch.device("meta"):
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        logits = model(input_ids=ids, use_cache=False, **extra).logits
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"logits of {list(logits.shape)} for {TOKENS} tokens")
        logits.float().sum().backward()
