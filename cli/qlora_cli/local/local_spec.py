"""Adapt a spec to a machine without a cluster: paths, fields that mean nothing here, the trainer's config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_api.errors import FieldError, ManifestError
from qlora_api.spec import GradientCheckpointing, QLoRAJobSpec
from qlora_storage.local_paths import expand_home, uri_problem, without_password

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_api.base import Model
    from qlora_cli.local.machine import World

_CLUSTER_ONLY = (
    "parallelism.workers",
    "parallelism.gpusPerWorker",
    "policy.activeDeadlineSeconds",
    "policy.ttlSecondsAfterFinished",
    "suspend",
)


def localize(spec: QLoRAJobSpec, cwd: Path) -> QLoRAJobSpec:
    """Make local paths absolute, and refuse what can only be reached in a cluster or is not there.

    Raises:
        ManifestError: names each such field.

    """
    errors: list[FieldError] = []

    def place(field: str, value: str, *, must_exist: bool) -> str:
        if problem := uri_problem(value):
            errors.append(FieldError(field, without_password(value), problem))
            return value
        scheme, separator, _ = value.partition("://")
        if scheme == "pvc":
            errors.append(FieldError(field, value, "is a volume of a cluster; 'qlora run' takes a local path instead"))
        if separator:
            return value
        path = (cwd / expand_home(value)).resolve()
        if must_exist and not path.exists():
            errors.append(FieldError(field, value, f"is not here: {path} does not exist"))
        return str(path)

    model = place("spec.model.source", spec.model.source, must_exist=True)
    train = place("spec.dataset.train.source", spec.dataset.train.source, must_exist=True)
    held_out = spec.dataset.eval
    if held_out is not None and held_out.source is not None:
        source = place("spec.dataset.eval.source", held_out.source, must_exist=True)
        held_out = held_out.model_copy(update={"source": source})
    evaluate = spec.evaluate
    if evaluate is not None and evaluate.folder is not None:
        definitions = place("spec.evaluate.folder", evaluate.folder, must_exist=True)
        evaluate = evaluate.model_copy(update={"folder": definitions})
    output = place("spec.output.destination", spec.output.destination, must_exist=False)
    tracking = [
        sink.model_copy(update={"folder": place(f"spec.tracking[{number}].folder", sink.folder, must_exist=False)})
        if sink.folder
        else sink
        for number, sink in enumerate(spec.tracking)
    ]
    if errors:
        raise ManifestError(errors)
    rows = spec.dataset.train.model_copy(update={"source": train})
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"source": model}),
            "dataset": spec.dataset.model_copy(update={"train": rows, "eval": held_out}),
            "output": spec.output.model_copy(update={"destination": output}),
            "evaluate": evaluate,
            "tracking": tracking,
        }
    )


def unused(spec: QLoRAJobSpec) -> list[str]:
    """Fields that are set and mean nothing on one machine, as ``name: value``."""
    found = [*_cluster_settings(spec)]
    groups = {
        "model": spec.model.credentials,
        "dataset.train": spec.dataset.train.credentials,
        "output": spec.output.credentials,
        **{f"tracking[{number}]": sink.credentials for number, sink in enumerate(spec.tracking)},
    }
    found += [f"{name}.credentials: {secret} (the environment counts)" for name, secret in groups.items() if secret]
    return found


def _cluster_settings(spec: QLoRAJobSpec) -> Iterator[str]:
    for path in _CLUSTER_ONLY:
        group, _, name = path.rpartition(".")
        holder: Any = spec.at(group) if group else spec
        if name in _changed(holder):
            yield f"{path}: {_json(spec.at(path))}"
    for name, value in _changed(spec.scheduling).items():
        yield f"scheduling.{name}: {_json(value)}"


def _changed(group: Model) -> dict[str, object]:
    """The fields of a group that differ from their defaults, by JSON name."""
    return {
        field.alias or name: getattr(group, name)
        for name, field in type(group).model_fields.items()
        if getattr(group, name) != field.get_default(call_default_factory=True)
    }


def _json(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{len(value)} of them" if isinstance(value, list) else str(value)


def checkpoints_gradients(spec: QLoRAJobSpec, world: World) -> bool:
    """Return whether activations are recomputed; Auto: on a GPU, where memory is what runs out."""
    choice = spec.training.gradient_checkpointing
    if choice is GradientCheckpointing.AUTO:
        return world.device == "CUDA"
    return choice is GradientCheckpointing.FULL
