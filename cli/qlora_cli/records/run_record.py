"""The record of a local run."""

from __future__ import annotations

from qlora_cli.records.recorded import DecimalText, Group, Integer, Recorded, Size


class _Source(Recorded):
    source: str | None = None


class _Dataset(Recorded):
    train: _Source | None = None
    format: str | None = None


class _Spec(Recorded):
    model: _Source | None = None
    dataset: _Dataset | None = None
    training: Group | None = None
    lora: Group | None = None
    quantization: Group | None = None
    output: Group | None = None


class _Attempt(Recorded):
    number: Integer | None = None
    world_size: Integer | None = None
    micro_batch_size: Integer | None = None
    gradient_accumulation_steps: Integer | None = None
    start_time: str | None = None
    end_time: str | None = None
    reason: str | None = None
    message: str | None = None
    exit_code: Integer | None = None
    node: str | None = None
    first_step: Integer | None = None
    last_step: Integer | None = None


class _RecordedProgress(Recorded):
    step: Integer | None = None
    total_steps: Integer | None = None
    epoch: DecimalText | None = None
    loss: DecimalText | None = None
    eval_loss: DecimalText | None = None
    best_eval_loss: DecimalText | None = None
    tokens_per_second: DecimalText | None = None
    eta_seconds: Integer | None = None


class _Memory(Recorded):
    predicted: dict[str, Size] | None = None
    measured: dict[str, Size] | None = None


class _Adapter(Recorded):
    uri: str = ""
    manifest_uri: str = ""
    manifest_sha256: str = ""


class _TrackedRun(Recorded):
    type: str = ""
    url: str = ""
    message: str | None = None


class _Result(Recorded):
    message: str | None = None
    progress: _RecordedProgress | None = None
    memory: _Memory | None = None
    adapter: _Adapter | None = None
    tracking: list[_TrackedRun] | None = None


class _Receipt(Recorded):
    train_rows: Integer | None = None
    train_tokens: Integer | None = None
    eval_rows: Integer | None = None
    truncated: Integer | None = None
    dropped: Integer | None = None
    fully_masked: Integer | None = None
    model_revision: str | None = None


class RecordedRun(Recorded):
    """``run.json`` as far as commands that show runs read it."""

    name: str
    created: str | None = None
    device: str | None = None
    spec: _Spec | None = None
    attempts: list[_Attempt] | None = None
    result: _Result | None = None
    receipt: _Receipt | None = None
