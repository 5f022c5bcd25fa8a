"""``QLoRAJob``: the object that is applied, and how a manifest becomes one."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, StringConstraints

from qlora_api.base import Model
from qlora_api.errors import validate
from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import QLoRAJobStatus

GROUP = "qlora.dev"
VERSION = "v1alpha1"
API_VERSION: Final = "qlora.dev/v1alpha1"
KIND: Final = "QLoRAJob"


class ObjectMeta(Model):
    """The part of Kubernetes' ObjectMeta that matters here; the rest is kept by the API server."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, StringConstraints(max_length=52, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    """At most 52 characters, so that names of children (attempt and pod index appended) stay valid host names."""
    namespace: str = "default"
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class QLoRAJob(Model):
    """One QLoRA fine-tuning: from a base model and rows to a verified adapter."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRAJob"] = KIND
    metadata: ObjectMeta
    spec: QLoRAJobSpec
    status: QLoRAJobStatus | None = None

    @classmethod
    def from_manifest(cls, manifest: Any) -> QLoRAJob:
        """Validate a parsed manifest.

        Raises:
            qlora_api.errors.ManifestError: every error at once, each with field, value and what is allowed.

        """
        return validate(cls, manifest)
