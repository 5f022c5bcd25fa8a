"""Record of Prepare for a machine's ranks: it is left whole, whoever leaves it at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_api.contract import TrainerConfig
from qlora_trainer.prepare.local_copy import PreparedInputs
from qlora_trainer.storage.base_folder import BASES

WRITERS, TIMES = 8, 200


def test_workers_that_leave_it_at_once_do_not_disturb_each_other(tmp_path):
    spec = {
        "model": {"source": "s3://b/model"},
        "dataset": {"train": {"source": "s3://b/rows.jsonl"}, "format": "Text"},
        "training": {"maxSteps": 1},
        "output": {"destination": "s3://b/out"},
    }
    config = TrainerConfig.model_validate(
        {
            "job": {"name": "job", "uid": "1"},
            "spec": spec,
            "batch": {"worldSize": 2, "microBatchSize": 1, "gradientAccumulationSteps": 8},
            "device": "CPU",
            "ranksPerWorker": 1,
            "gradientCheckpointing": False,
            "checkpointUri": str(tmp_path / "checkpoints"),
            "cacheDir": str(tmp_path),
            "terminationMessagePath": str(tmp_path / "message"),
        }
    )
    model, rows = tmp_path / BASES / "model", tmp_path / "data"
    model.mkdir(parents=True)
    rows.mkdir()
    prepared = PreparedInputs(model, "s3://b/model", "revision", rows, None)

    def write(_: int) -> None:
        for _ in range(TIMES):
            prepared.write(config)
            assert PreparedInputs.read(config) == prepared

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    assert [path.name for path in Path(tmp_path, "prepared").iterdir()] == ["1.json"]
