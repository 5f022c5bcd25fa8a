"""Find layers whose weights are not in a base's files, by names and shapes alone."""

from __future__ import annotations

import copy
import json
import logging
from typing import TYPE_CHECKING, Any

import torch

from qlora_api.errors import FieldError
from qlora_memory.shape.on_disk import dequantized
from qlora_trainer.errors import UserError
from qlora_trainer.model.composite import trained_class
from qlora_trainer.storage.model_files import CONFIG, weight_infos

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


def missing_matrices(path: Path, config: Any) -> list[str]:
    """Return the matrices of the model that is trained which its class does not find in the base's files.

    Transformers gives such a matrix random values, with a warning; one of another shape it refuses. A vector may be
    what its class begins with. A class that does more with weights than to name and stack them is not judged.

    Raises:
        UserError: a weight cannot be dequantized.

    """
    try:
        tensors = dequantized(json.loads((path / CONFIG).read_bytes()), weight_infos(path)) or {}
    except FieldError as error:
        raise UserError(error.field, None, error.allowed) from None
    found = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    try:
        model, loaded = trained_class(config).from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=found,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001 each class fails without values in its own way
        log.info("weights cannot be looked for without values: %s: %s", type(error).__name__, error)
        return []
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return sorted(matrices & {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])})
