"""The tracking tools by their type. Each one's package is imported only where a job names the tool."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, assert_never

from qlora_api.credentials import TRACKING_KEYS
from qlora_api.spec import SinkType
from qlora_storage.metadata_addresses import REFUSED, leads_to_metadata
from qlora_trainer.errors import UserError
from qlora_trainer.tracking.run_facts import RunFacts

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig
    from qlora_trainer.tracking.run_facts import Sink

MODULES = {SinkType.TENSORBOARD: "tensorboard", SinkType.MLFLOW: "mlflow", SinkType.WANDB: "wandb"}
KEYS = {
    SinkType.TENSORBOARD: frozenset[str](),
    SinkType.MLFLOW: frozenset(key for key in TRACKING_KEYS if key.startswith("MLFLOW_")),
    SinkType.WANDB: frozenset(key for key in TRACKING_KEYS if key.startswith("WANDB_")),
}
"""Credentials of each tool."""


def sink_class(facts: RunFacts) -> type[Sink]:
    """Import what writes to a tool.

    Raises:
        UserError: its package is not installed, or the job names a server that is none for it.

    """
    require_package(facts)
    if facts.sink.server is not None and leads_to_metadata(facts.sink.server, os.environ):
        raise UserError(f"{facts.field}.server", facts.sink.server, REFUSED)
    match facts.sink.type:
        case SinkType.TENSORBOARD:
            from qlora_trainer.tracking.tensorboard_sink import TensorBoardSink  # noqa: PLC0415 optional

            return TensorBoardSink
        case SinkType.MLFLOW:
            from qlora_trainer.tracking.mlflow_sink import MLflowSink  # noqa: PLC0415 optional

            return MLflowSink
        case SinkType.WANDB:
            from qlora_trainer.tracking.wandb_sink import WandBSink  # noqa: PLC0415 optional

            return WandBSink
        case _:
            assert_never(facts.sink.type)


def check_tracking(config: TrainerConfig) -> None:
    """Check that each tool of spec.tracking takes runs.

    Raises:
        UserError: a package is not installed, or a tool refuses.
        StorageError: a tool cannot be reached.

    """
    for number in range(len(config.spec.tracking)):
        facts = RunFacts.of(config, number)
        sink_class(facts).check(facts)


def require_package(facts: RunFacts) -> None:
    """Check that the tool's package is installed.

    Raises:
        UserError: it is not.

    """
    module = MODULES[facts.sink.type]
    if find_spec(module) is None:
        raise UserError(
            f"{facts.field}.type",
            facts.sink.type.value,
            f'needs the Python package {module}, which is not installed: install the trainer\'s extra "tracking" '
            "(in a cluster, in its image), or leave this entry out",
        )
