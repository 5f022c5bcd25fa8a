"""Count the quantized parameters and the adapted layers of the loaded model."""

from __future__ import annotations

import math
from typing import Any

from peft.tuners.lora import LoraLayer

from qlora_memory import Coverage
from qlora_trainer.model.base_model import is_quantized
from qlora_trainer.model.experts.adapter import ExpertAdapter
from qlora_trainer.model.experts.structure import expert_groups
from qlora_trainer.model.experts.targets import linear_layers
from qlora_trainer.model.trained_tokens import trained_count


def coverage_of(model: Any) -> Coverage:
    """Count on a model with its adapter."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = expert_groups(model)
    wrapped = {id(m.get_base_layer()) for m in model.modules() if isinstance(m, ExpertAdapter)}
    return Coverage(
        weights=sum(_elements(p) for p in frozen),
        quantized=sum(_elements(p) for p in frozen if is_quantized(p)),
        layers=sum(".lora_" not in name for name in linear_layers(model)),
        adapted_layers=sum(isinstance(m, LoraLayer) and not isinstance(m, ExpertAdapter) for m in model.modules()),
        groups=len(groups),
        adapted_groups=sum(id(group) in wrapped for group in groups.values()),
        tokens=trained_count(model),
    )


def _elements(parameter: Any) -> int:
    """Return the elements of a parameter as it was before it was packed or partitioned."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return math.prod(getattr(parameter, "ds_shape", parameter.shape))
