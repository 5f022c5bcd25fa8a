"""Compare what a manifest says with a model folder on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qlora_api.errors import FieldError
from qlora_cli.manifest import crd_schema
from qlora_cli.manifest.local_paths import local_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
NO_TEMPLATE = (
    "is needed: the model's tokenizer has no chat template. Set one that goes with the model (most base"
    " models have none; that of the instruction-tuned sibling is a good start), or use format"
    " PromptCompletion or Text"
)
"""As Prepare says it (qlora_trainer.data.chat_template)."""


def model_errors(manifest: object) -> Iterator[FieldError]:
    """Yield an error for each field that does not suit a local model folder, in the words of Prepare.

    What is not a folder here is left to others: the manifest may be for another machine.
    """
    source = _field(manifest, "model", "source")
    folder = local_folder(source)
    if folder is None:
        return
    config = _json(folder / CONFIG)
    if config is None:
        yield FieldError("spec.model.source", source, f"has no {CONFIG} that can be read")
        return
    positions, longest = positions_of(config), _field(manifest, "dataset", "maxLength")
    if longest is None:
        longest = crd_schema.default_of("spec.dataset.maxLength")
    if positions and isinstance(longest, int) and longest > positions:
        yield FieldError("spec.dataset.maxLength", longest, f"is more than the {positions} positions of {source}")
    uses_template = _field(manifest, "dataset", "format") == "Messages"
    if uses_template and _field(manifest, "dataset", "chatTemplate") is None and _lacks_template(folder):
        yield FieldError("spec.dataset.chatTemplate", None, NO_TEMPLATE)


def positions_of(config: dict[str, Any]) -> int | None:
    """Return how many positions the language model of a base has; None where its configuration does not say it."""
    from qlora_memory.shape.text_part import text_part  # noqa: PLC0415 nothing else here needs the memory model

    positions = text_part(config, None).config.get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def positions_of_folder(source: str) -> int | None:
    """Return how many positions a local model has; None where that is not known."""
    folder = local_folder(source)
    config = _json(folder / CONFIG) if folder else None
    return positions_of(config) if config else None


def _lacks_template(folder: Path) -> bool:
    """Return whether there is a tokenizer, and no chat template of its own."""
    if not any((folder / name).exists() for name in TOKENIZER):
        return False
    settings = _json(folder / "tokenizer_config.json") or {}
    return not settings.get("chat_template") and not any((folder / name).exists() for name in TEMPLATES)


def _field(manifest: object, group: str, name: str) -> Any:
    value: Any = manifest
    for key in ("spec", group, name):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
