"""``QLoRAJob``: the object that is applied, and how a manifest becomes one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from qlora_api.base import Model, Timestamp
from qlora_api.errors import field_types, validate
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
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


def unknown_fields(model: type[BaseModel], value: Any, path: str) -> Iterator[str]:
    """Give the paths of all fields that a type does not have."""
    types = field_types(model)
    for name, inside in value.items() if isinstance(value, dict) else ():
        if name not in types:
            yield f"{path}.{name}"
            continue
        if (inner := types[name]) is not None:
            for part in inside if isinstance(inside, list) else [inside]:
                yield from unknown_fields(inner, part, f"{path}.{name}")


class KubernetesObject(Model):
    """An object with metadata, spec and status that the API server has."""

    @classmethod
    def read(cls, stored: Any) -> tuple[Self, tuple[str, ...]]:
        """Read what the API server has, of any version; return it with the paths of spec that are not known here.

        Raises:
            pydantic.ValidationError: a known field has a value that is not known here.

        """
        try:
            return cls.model_validate(stored), ()
        except ValidationError:
            spec = field_types(cls)["spec"]
            assert spec is not None
            return cls.model_validate(stored, extra="ignore"), tuple(unknown_fields(spec, stored["spec"], "spec"))


class QLoRAJob(KubernetesObject):
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
