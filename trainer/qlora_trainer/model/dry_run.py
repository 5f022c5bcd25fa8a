"""A forward and backward pass without data: which adapters would learn, before any weight is loaded."""

from __future__ import annotations

import logging
from typing import Any

import torch

from qlora_trainer.model.experts.forward import use_own_forward

TOKENS = 8
log = logging.getLogger(__name__)


def adapters_without_gradient(model: Any) -> list[str]:
    """Return the adapted layers that no gradient reaches, such as those of an image tower; empty where all learn.

    Shapes and the graph are followed on the meta device. A model that cannot run there, since it decides by values, is
    not judged.

    Args:
        model: the base without weights, with its adapter; its gradients are left behind.

    """
    use_own_forward(model.get_base_model())
    was_training = model.training
    model.train()
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")  # its values would tell what a mask of two dimensions means
    failure = None
    for extra in ({"attention_mask": mask}, {}):
        try:
            _run(model, **extra)
        except Exception as error:  # noqa: BLE001 each class fails without values in its own way
            failure = error
            continue
        break
    else:
        log.info("the base cannot be tried without weights: %s: %s", type(failure).__name__, failure)
        return []
    model.train(was_training)
    lost = {n.split(".lora_")[0] for n, p in model.named_parameters() if ".lora_B." in n and p.grad is None}
    return sorted(n.removeprefix("base_model.model.") for n in lost)


def _run(model: Any, **extra: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    with torch.device("meta"):
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        logits = model(input_ids=ids, use_cache=False, **extra).logits
        logits.float().sum().backward()
