"""The record that Prepare leaves for the ranks: where the model and the tokenized rows are on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qlora_api.contract import TrainerConfig


@dataclass(frozen=True)
class Prepared:
    """What the ranks need to know."""

    model_path: Path
    model_source: str
    """As in the manifest."""
    model_revision: str
    data_dir: Path

    @staticmethod
    def path(config: TrainerConfig) -> Path:
        return Path(config.cache_dir) / "prepared" / f"{config.job.uid}.json"

    @classmethod
    def read(cls, config: TrainerConfig) -> Prepared | None:
        """What was left for this job on this machine; None where nothing was, or it is gone from the cache."""
        try:
            record = json.loads(cls.path(config).read_text())
            prepared = cls(
                model_path=Path(record["model_path"]),
                model_source=record["model_source"],
                model_revision=record["model_revision"],
                data_dir=Path(record["data_dir"]),
            )
        except (FileNotFoundError, KeyError):  # an older version wrote other fields
            return None
        return prepared if prepared.model_path.exists() and prepared.data_dir.exists() else None

    def write(self, config: TrainerConfig) -> None:
        path = self.path(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(vars(self), default=str))
        partial.rename(path)
