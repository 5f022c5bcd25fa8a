"""``manifest.json``: what was published, by which run, from what. No manifest, no adapter."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from qlora_api.base import Model, Timestamp
from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import TaskResult

MANIFEST = "manifest.json"
ADAPTER = "adapter"
MERGED = "merged"
SIGNATURE_PURPOSE = "manifest"
SCHEMA: Final = "qlora.dev/manifest/v1"
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "peft",
    "qlora-operator",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class PublishFacts:
    """Facts about a finished run, for the manifest and the model card."""

    spec: QLoRAJobSpec
    base_revision: str
    step: int
    """Optimizer steps behind the published weights: those of the best checkpoint."""
    total_steps: int
    tokens: int
    """Real tokens trained on, over all ranks and attempts."""
    base_eval_loss: float | None
    """Evaluation loss of the base, before the first step, in nats per token."""
    eval_loss: float | None
    """Evaluation loss of the published adapter, in nats per token."""
    quantized: str = ""
    """Part of the base that is quantized, as text; empty where it was not counted."""
    adapted: str = ""
    """Layers with an adapter, as a sentence."""
    adapts_experts: bool = False
    tasks: tuple[TaskResult, ...] = ()
    """Results of the base and of the adapter in the tasks of spec.evaluate."""


class BaseModelRef(Model):
    """The model the adapter belongs to."""

    source: str
    revision: str


class ManifestFile(Model):
    path: str
    """Relative to the manifest's folder."""
    size: int = Field(ge=0)
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Model):
    """The last thing written, once and create-only."""

    schema_version: Literal["qlora.dev/manifest/v1"] = Field(SCHEMA, alias="schema")
    job: str
    namespace: str
    run_uid: str
    attempt: int
    created: Timestamp
    base: BaseModelRef
    adapter: str
    """Folder in PEFT's layout, relative to the manifest's folder."""
    merged: str | None
    """Folder of the base with the adapter merged in, where spec.output.merge asks for it."""
    files: tuple[ManifestFile, ...]
    metrics: dict[str, int | float | None]
    packages: dict[str, str]
    config: dict[str, Any]
    """The job's spec, every default filled in."""
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """HMAC-SHA256 over all other fields, with the run's key: this run's attempt has written it. Only the run can tell;
    everyone else has the hashes. None: of a run without a key."""

    def to_bytes(self) -> bytes:
        left_out = {"signature"} if self.signature is None else None
        return self.model_dump_json(by_alias=True, indent=2, exclude=left_out).encode() + b"\n"


def metrics_of(facts: PublishFacts) -> dict[str, int | float | None]:
    """Name the run's numbers; pydantic writes what is not finite as null."""
    return {
        "step": facts.step,
        "totalSteps": facts.total_steps,
        "tokens": facts.tokens,
        "baseEvalLoss": facts.base_eval_loss,
        "evalLoss": facts.eval_loss,
        **{
            f"{who}:{task.name}:{task.metric}": float(value)
            for task in facts.tasks
            for who, value in (("base", task.base), ("adapter", task.adapter))
            if value is not None
        },
    }


def installed_packages() -> dict[str, str]:
    """Versions of Python and of the packages that shape the result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
