"""``QLoRASweep``: the object that is applied, and how a manifest becomes one."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import StringConstraints

from qlora_api.errors import ManifestError, validate
from qlora_api.job import API_VERSION, KubernetesObject, ObjectMeta
from qlora_api.sweep.check import sweep_errors
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.status import QLoRASweepStatus

SWEEP_KIND: Final = "QLoRASweep"


class SweepMeta(ObjectMeta):
    name: Annotated[str, StringConstraints(max_length=48, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    """At most 48 characters, so that names of trials, with a number appended, are valid names of jobs."""


class QLoRASweep(KubernetesObject):
    """A search for the best settings of a QLoRAJob."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRASweep"] = SWEEP_KIND
    metadata: SweepMeta
    spec: QLoRASweepSpec
    status: QLoRASweepStatus | None = None

    @classmethod
    def from_manifest(cls, manifest: Any) -> QLoRASweep:
        """Validate a parsed manifest.

        Raises:
            qlora_api.errors.ManifestError: every error at once, each with field, value and what is allowed.

        """
        sweep = validate(cls, manifest)
        if errors := sweep_errors(sweep.spec):
            raise ManifestError(errors)
        return sweep
