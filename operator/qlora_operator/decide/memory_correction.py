"""Compare the memory that finished jobs took with what was predicted for them. Pure.

One factor for each GPU product and quantization. Prepare multiplies what a choice needs by it before it holds it
against the GPU; what is predicted in status stays as the formulas have it, or the factor would learn from itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, ValidationError

from qlora_api.base import Model
from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import ConditionType, MemoryComponent, QLoRAJobStatus
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests.profiles import gpu_of

log = logging.getLogger(__name__)

LEAST, MOST = 0.95, 1.15
"""Bounds of the factor, and of what one job may report: the formulas hold within 3% (docs/explanation/memory.md); what
is further
off than this is another error than theirs."""
WEIGHT = 0.2
"""Weight of a new job against all before it: the last ten make up nine tenths."""
WORTH_WRITING = 0.005
"""Smallest relative change of the factor that is written down."""


class Learned(Model):
    """One value of the ConfigMap, as JSON."""

    correction: float = Field(1.0, gt=0, allow_inf_nan=False)
    jobs: int = Field(0, ge=0)
    """That it was learned from."""

    def bounded(self) -> Learned:
        return self.model_copy(update={"correction": min(max(self.correction, LEAST), MOST)})


@dataclass(frozen=True, order=True)
class CorrectionKey:
    """Key of a correction factor."""

    gpu: str
    """A name of ``qlora plan``'s table."""
    quantization: str

    def __str__(self) -> str:
        """Key in the ConfigMap."""
        return f"{self.gpu}.{self.quantization}"

    @classmethod
    def of(cls, spec: QLoRAJobSpec, config: OperatorConfig) -> CorrectionKey | None:
        """None where it is not known which GPU a rank gets."""
        gpu = gpu_of(spec, config)
        return cls(gpu, spec.quantization.type.value) if gpu else None


def ratio_of(status: QLoRAJobStatus) -> float | None:
    """Measured over predicted peak of a job that succeeded; None where either is not known."""
    if status.memory is None or status.state != ConditionType.SUCCEEDED:
        return None
    peak = MemoryComponent.PEAK.value
    predicted, measured = status.memory.predicted.get(peak), status.memory.measured.get(peak)
    return measured / predicted if predicted and measured else None


def learn(before: Learned, ratio: float) -> Learned:
    """Take in one more job."""
    bounded = min(max(ratio, LEAST), MOST)
    return Learned(correction=before.correction + WEIGHT * (bounded - before.correction), jobs=before.jobs + 1)


def read(data: Mapping[str, str]) -> dict[CorrectionKey, Learned]:
    """The ConfigMap's data; what nobody here wrote is left out, and what a person wrote is kept within bounds."""
    found: dict[CorrectionKey, Learned] = {}
    for key, text in data.items():
        gpu, _, quantization = key.rpartition(".")
        try:
            found[CorrectionKey(gpu, quantization)] = Learned.model_validate_json(text).bounded()
        except ValidationError as error:
            log.warning("%s of the memory ConfigMap cannot be read and counts as 1: %s", key, error)
    return found


def is_news(before: Learned | None, after: Learned) -> bool:
    """Return whether a factor is worth a write."""
    written = before.correction if before else 1.0
    return not math.isclose(after.correction, written, rel_tol=WORTH_WRITING)
