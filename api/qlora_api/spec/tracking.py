"""Fields of experiment tracking: tools that get a job's parameters, metrics and artifacts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import StringConstraints

from qlora_api.base import Model, Rule
from qlora_api.spec.values import Destination, Name

DEFAULT_PROJECT = "qlora"


class SinkType(StrEnum):
    TENSORBOARD = "TensorBoard"
    MLFLOW = "MLflow"
    WANDB = "WandB"


Server = Annotated[str, StringConstraints(max_length=512, pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$")]
Project = Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\s/\\#?%:]([^/\\#?%:]*[^\s/\\#?%:])?$")]


class TrackingSink(Model):
    """A tracking tool that gets the run's parameters, metrics and artifacts."""

    type: SinkType
    """TensorBoard (event files in a folder), MLflow (a tracking server) or WandB (Weights & Biases)."""
    folder: Destination | None = None
    """TensorBoard: folder in object storage (or a local one with 'qlora run'). The run gets its
    own folder in it."""
    server: Server | None = None
    """MLflow: URL of the tracking server. WandB: URL of a server of your own. Default: https://api.wandb.ai. Put
    credentials into a Secret, not into the URL."""
    project: Project | None = None
    """MLflow: name of the experiment, which is created if it does not exist. WandB: name of the project. Default:
    qlora."""
    entity: Project | None = None
    """WandB: team or user that owns the project. Default: that of the API key."""
    credentials: Name | None = None
    """Secret in the job's namespace. MLflow: MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD. WandB: WANDB_API_KEY. TensorBoard: as for output.destination. All Secrets of a job are
    merged into one environment, in the order model, dataset.train, output, tracking. If a key occurs twice, the later
    Secret wins."""
    rules: ClassVar = (
        Rule(
            "has(self.folder) == (self.type == 'TensorBoard')",
            "folder is required for type TensorBoard and not allowed for other types",
            "folder",
            lambda s: (s.folder is not None) == (s.type is SinkType.TENSORBOARD),
        ),
        Rule(
            "self.type == 'WandB' || has(self.server) == (self.type == 'MLflow')",
            "server is required for type MLflow, optional for WandB and not allowed for TensorBoard",
            "server",
            lambda s: s.type is SinkType.WANDB or (s.server is not None) == (s.type is SinkType.MLFLOW),
        ),
        Rule(
            "!has(self.project) || self.type != 'TensorBoard'",
            "project is only allowed for types MLflow and WandB",
            "project",
            lambda s: s.project is None or s.type is not SinkType.TENSORBOARD,
        ),
        Rule(
            "!has(self.entity) || self.type == 'WandB'",
            "entity is only allowed for type WandB",
            "entity",
            lambda s: s.entity is None or s.type is SinkType.WANDB,
        ),
    )

    @property
    def effective_project(self) -> str:
        """``project`` with its default."""
        return self.project or DEFAULT_PROJECT
