"""Record where the model and the tokenized rows are on this machine, for its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from qlora_api.contract import TrainerConfig
from qlora_memory import ModelShape
from qlora_storage.object_store import local_path
from qlora_trainer.errors import UserError
from qlora_trainer.storage.base_folder import BASES, changed_file
from qlora_trainer.storage.fetch import MODEL_FIELD, fetch_model

if TYPE_CHECKING:
    from qlora_trainer.prepare.records import Record, Records


@dataclass(frozen=True)
class PreparedInputs:
    """Paths and values that the ranks need from Prepare."""

    model_path: Path
    model_source: str
    """As in the manifest."""
    model_revision: str
    data_dir: Path
    shape: ModelShape | None
    """Shape of the base for which memory was planned; None where it could not be determined."""
    tasks_dir: Path | None = None
    """Folder of the tasks of spec.evaluate; None without tasks."""

    @staticmethod
    def path(config: TrainerConfig) -> Path:
        return Path(config.cache_dir) / "prepared" / f"{config.job.uid}.json"

    @classmethod
    def read(cls, config: TrainerConfig) -> PreparedInputs | None:
        """Read what was left for this job on this machine; None where nothing was, or it is gone from the cache."""
        try:
            prepared = _FORMAT.validate_json(cls.path(config).read_bytes())
        except (FileNotFoundError, ValidationError):  # an older version wrote other fields
            return None
        # An older version had its ranks load from the source itself.
        is_private = prepared.model_path.parent == Path(config.cache_dir) / BASES
        folders = (prepared.model_path, prepared.data_dir, prepared.tasks_dir)
        return prepared if is_private and all(folder is None or folder.exists() for folder in folders) else None

    @property
    def stays(self) -> bool:
        """Return whether nobody but this trainer writes to the model: it was fetched, and is no local folder."""
        return local_path(self.model_source, MODEL_FIELD) is None

    def check_unchanged(self) -> None:
        """Find out that the base's weights are still those that were checked.

        Raises:
            UserError: somebody has changed them meanwhile.

        """
        if name := changed_file(self.model_path):
            raise UserError(
                MODEL_FIELD,
                self.model_source,
                f"has a {name} that was changed while the job used it: nothing of this attempt is published. Put back "
                "what the run began on and start it again, or start a new run",
            )

    def write(self, config: TrainerConfig) -> None:
        """Leave it for the ranks; several workers on one machine may do so at once."""
        path = self.path(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as partial:
            partial.write(_FORMAT.dump_json(self))
        Path(partial.name).rename(path)


_FORMAT = TypeAdapter(PreparedInputs)


def bring_inputs(config: TrainerConfig, record: Record, records: Records) -> PreparedInputs | None:
    """Bring here what the run began with: that revision of the model, those rows. What is here is not fetched again.

    Returns:
        None where the rows or the tasks are damaged, and have to be made anew.

    Raises:
        UserError: the model cannot be used, or is another one by now.
        StorageError: something is out of reach, or this machine's disk is full.

    """
    model = fetch_model(config.spec.model.source, Path(config.cache_dir), record.model_revision)
    rows = records.bring_rows(record)
    tasks = records.bring_tasks(record)
    if rows is None or (record.tasks_hash and tasks is None):
        return None
    prepared = PreparedInputs(model.path, model.source, model.revision, rows, record.shape, tasks)
    prepared.write(config)
    return prepared
