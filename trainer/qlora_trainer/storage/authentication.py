"""Authenticate what a run leaves where others can write, and who its workers are, with a key that only the run has.

The key is a file: in a pod of a Secret of the job's own, of 'qlora run' beside its record. It is never in the config,
the environment, a log or a termination message. Each purpose gets a key of its own, derived with HMAC-SHA256, so that
what is made for one purpose proves nothing for another.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_api.base import Model
from qlora_trainer.errors import TrainerError

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig

MINIMUM_BYTES = 32
"""Minimum size of a key: that of SHA-256's output (RFC 2104, section 3)."""
MAXIMUM_BYTES = 4096
M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Authenticator:
    """Sign with the run's key, and tell what was signed with it."""

    key: bytes | None = field(repr=False)
    """None: the run was started without one; nothing is signed, and nothing can be checked."""
    accepts_unsigned: bool = False
    """True if data without a signature is accepted, as for a run that began before runs had keys."""

    @classmethod
    def of(cls, config: TrainerConfig) -> Authenticator:
        """Read the key that the config names.

        Raises:
            TrainerError: the file cannot be read, or is too short for a key.

        """
        if config.key_file is None:
            return cls(None, accepts_unsigned=True)
        path = Path(config.key_file)
        try:
            with path.open("rb") as file:
                key = file.read(MAXIMUM_BYTES).strip()
        except OSError as error:
            raise TrainerError(f"keyFile: {path} cannot be read: {error.strerror}") from error
        if len(key) < MINIMUM_BYTES:
            raise TrainerError(f"keyFile: {path} holds {len(key)} bytes; a key has at least {MINIMUM_BYTES}")
        return cls(key, config.accepts_unsigned)

    def derive(self, purpose: str) -> bytes:
        """Return the key for one purpose."""
        if self.key is None:
            raise ValueError("there is no key to derive another from")
        return hmac.digest(self.key, f"qlora.dev/v1/{purpose}".encode(), "sha256")

    def sign(self, purpose: str, body: dict[str, Any]) -> str | None:
        """Return the signature of a JSON object in hexadecimal; None without a key."""
        return None if self.key is None else hmac.digest(self.derive(purpose), canonical(body), "sha256").hex()

    def signed(self, purpose: str, model: M) -> M:
        """Return a model whose field ``signature`` signs all others."""
        body = model.model_dump(mode="json", by_alias=True, exclude={"signature"})
        return model.model_copy(update={"signature": self.sign(purpose, body)})

    def problem_of_file(self, purpose: str, data: bytes) -> str | None:
        """Return what :meth:`problem` does of a file with a signed model: an earlier version's has fewer fields."""
        body = json.loads(data)
        return self.problem(purpose, body, body.pop("signature", None))

    def problem(self, purpose: str, body: dict[str, Any], signature: object) -> str | None:
        """Say why ``body`` does not count as written by this run; None where it does."""
        if self.key is None or (signature is None and self.accepts_unsigned):
            return None
        if signature is None:
            return "it has no signature"
        expected = self.sign(purpose, body) or ""
        if isinstance(signature, str) and hmac.compare_digest(signature.encode(), expected.encode()):
            return None
        return "its signature is not of this run's key"


UNAUTHENTICATED = Authenticator(None, accepts_unsigned=True)
"""Authenticator of a run without a key."""


def canonical(body: dict[str, Any]) -> bytes:
    """Return the same bytes for the same JSON object, whatever the order of its fields."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
