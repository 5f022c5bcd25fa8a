"""Model, rows, checkpoints and adapter all in S3, on a real server: nothing needs a disk that outlives the pod."""

from __future__ import annotations

import json
import shutil

import pytest

from qlora_api.contract import ExitCode
from qlora_storage.object_store import open_store
from qlora_trainer.publish.publisher import verify_published


@pytest.mark.ranks
def test_a_job_lives_in_object_storage_and_resumes_from_it(runner, s3):
    bucket = open_store(s3, "test")
    for path in runner.model.iterdir():
        bucket.put(f"model/{path.name}", path)
    bucket.put("rows/train.jsonl", runner.rows)
    changes = {
        "model": {"source": f"{s3}/model"},
        "dataset": {"train": {"source": f"{s3}/rows/train.jsonl"}},
        "output": {"destination": f"{s3}/adapters/tiny"},
        "parallelism": {"zeroStage": 2},
    }
    in_store = {"checkpoint_uri": f"{s3}/checkpoints"}
    whole = {"training": {"epochs": None, "maxSteps": 6}, "checkpoint": {"everySteps": 2}}
    first = runner.config(**changes, **whole).model_copy(update=in_store)
    ended = runner.run(first)
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert verify_published(ended.message.adapter.manifest_uri) == []
    manifest = json.loads(bucket.get("adapters/tiny/manifest.json"))
    assert manifest["base"]["source"] == f"{s3}/model"

    # the newest checkpoint is lost, and so is everything on this machine: the run goes on from the one before
    newest = max(key.split("/")[1] for key, _ in bucket.list("checkpoints"))
    bucket.delete(f"checkpoints/{newest}")
    bucket.delete("adapters")
    shutil.rmtree(runner.cache)
    again = runner.run(runner.config(attempt=2, **changes, **whole).model_copy(update=in_store))
    assert again.code == ExitCode.DONE, again.log[-3000:]
    assert sorted(again.losses) == [5, 6]
    assert again.losses == pytest.approx({s: ended.losses[s] for s in (5, 6)}, rel=1e-4)
