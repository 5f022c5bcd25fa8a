"""The use a base makes of its linear layers, as ``qlora_trainer.model.dry_run`` finds it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ATTRIBUTE = "_qlora_layer_use"


@dataclass(frozen=True)
class LayerUse:
    """Linear layers that cannot be treated as others are, by full name."""

    read: frozenset[str] = frozenset()
    """The model reads or changes their weight itself, which must therefore stay as it is."""
    idle: frozenset[str] = frozenset()
    """They are not called, or no gradient reaches their output: an adapter would learn nothing."""

    @property
    def without_adapter(self) -> frozenset[str]:
        """Return the layers that get no adapter unless the job names them."""
        return self.read | self.idle


def note_layer_use(model: Any, use: LayerUse) -> None:
    """Have a model know how its layers are used."""
    vars(model)[_ATTRIBUTE] = use


def known_layer_use(model: Any) -> LayerUse:
    """Return what :func:`note_layer_use` told a model; without it, that nothing is special."""
    found: LayerUse = vars(model).get(_ATTRIBUTE, LayerUse())
    return found
