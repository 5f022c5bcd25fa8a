"""The answer to one question that ``qlora doctor`` asks the API server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_cli.kube.api_client import Object


@dataclass(frozen=True)
class Answer:
    """Answer to one question: a value, or why there is none."""

    value: Any = None
    denied: bool = False
    missing: bool = False
    text: str = ""

    @property
    def there(self) -> bool:
        return not (self.denied or self.missing)

    @property
    def items(self) -> list[Object]:
        return list(self.value) if self.there and self.value is not None else []
