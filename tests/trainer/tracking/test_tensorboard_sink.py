from __future__ import annotations

from qlora_trainer.tracking.tensorboard_sink import TensorBoardSink
from tracking_fixtures import facts_of, scalars, step_rows, texts


def facts(tmp_path, attempt=1):
    return facts_of({"type": "TensorBoard", "folder": str(tmp_path)}, attempt)


def test_a_reader_sees_each_step_once_whatever_earlier_attempts_left(tmp_path):
    first = TensorBoardSink(facts(tmp_path))
    first.write(step_rows(1, 7, loss=9.0))
    first.write(step_rows(8, 8, loss=9.0))
    first.close()  # without an end
    second = TensorBoardSink(facts(tmp_path, attempt=2))
    second.write(step_rows(1, 5))
    second.write(step_rows(6, 9))
    second.finish([], 0, "s3://adapters/tiny", tmp_path)
    second.close()
    folder = tmp_path / "tiny-0a1b2c3d"
    assert scalars(folder) == {
        "train/loss": [(step, 1.0) for step in range(1, 10)],
        "train/epoch": [(step, step / 4) for step in range(1, 10)],
    }
    assert texts(folder)["adapter"] == "s3://adapters/tiny"
    assert "| lora.rank | 16 |" in texts(folder)["parameters"]
