"""Jobs and runs as the API server and 'qlora run' would write them."""

import io
from datetime import UTC, datetime

from rich.console import Console

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)
GIB = 1 << 30
SPEC = {
    "model": {"source": "hf://meta-llama/Llama-3.1-8B@main"},
    "dataset": {"train": {"source": "s3://data/support.jsonl"}, "format": "Messages", "maxLength": 4096},
    "quantization": {"type": "NF4"},
    "lora": {"rank": 16, "alpha": 32},
    "training": {"epochs": 2, "globalBatchSize": 16, "learningRate": "2e-4"},
    "parallelism": {"workers": 2, "gpusPerWorker": 4, "zeroStage": 0},
    "output": {"destination": "s3://adapters/support"},
    "policy": {"maxRestarts": 3},
    "suspend": False,
}
PROGRESS = {
    "step": 120,
    "totalSteps": 400,
    "epoch": "0.6",
    "loss": "1.2345",
    "evalLoss": "1.3",
    "bestEvalLoss": "1.29",
    "tokensPerSecond": "12345.6",
    "etaSeconds": 5400,
}
ADAPTER = {
    "uri": "s3://adapters/support/3f2a9c01-attempt-2/adapter",
    "manifestUri": "s3://adapters/support/manifest.json",
    "manifestSha256": "ab" * 32,
}
FIRST = {
    "number": 1,
    "worldSize": 8,
    "microBatchSize": 2,
    "gradientAccumulationSteps": 1,
    "startTime": "2026-01-02T10:00:00Z",
    "endTime": "2026-01-02T10:30:00Z",
    "reason": "OutOfDeviceMemory",
    "message": "no memory for 512 MiB at step 60",
    "exitCode": 41,
    "node": "gpu-1, gpu-2",
    "firstStep": 0,
    "lastStep": 60,
}
SECOND = {
    "number": 2,
    "worldSize": 8,
    "microBatchSize": 1,
    "gradientAccumulationSteps": 2,
    "startTime": "2026-01-02T10:31:00Z",
    "node": "gpu-1, gpu-2",
}


def job(name="support", state="Running", reason="Training", message="", **status):
    """A job in a state."""
    kind = "Running" if state == "Pending" else state
    holds = "False" if state == "Pending" else "True"
    conditions = [{"type": kind, "status": holds, "reason": reason, "message": message}]
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name, "namespace": "research", "creationTimestamp": "2026-01-02T09:58:00Z"},
        "spec": SPEC,
        "status": {"state": state, "reason": reason, "conditions": conditions, **status},
    }


def running(name="support", **more):
    memory = {"predicted": {"quantizedWeights": 4 * GIB, "peak": 30 * GIB}, "measured": {"peak": 23 * GIB}}
    message = "attempt 2: 8 ranks on gpu-1, gpu-2"
    status = {"progress": PROGRESS, "attempts": [FIRST, SECOND], "restarts": 1, "memory": memory, **more}
    return job(name, "Running", "Training", message, startTime="2026-01-02T10:00:00Z", **status)


def succeeded(name="done", **more):
    ended = {**SECOND, "endTime": "2026-01-02T11:30:00Z", "reason": "Completed", "exitCode": 0, "lastStep": 400}
    progress = {**PROGRESS, "step": 400, "etaSeconds": 0}
    times = {"startTime": "2026-01-02T10:00:00Z", "completionTime": "2026-01-02T11:30:10Z"}
    status = {"progress": progress, "attempts": [FIRST, ended], "adapter": ADAPTER, **times, **more}
    return job(name, "Succeeded", "Completed", "step 400 of 400", **status)


def failed(name="wrong"):
    message = 'spec.lora.targetModules: "q_prj" matches no layer of opt-6.7b; its linear layers are q_proj, k_proj'
    times = {"startTime": "2026-01-02T10:00:00Z", "completionTime": "2026-01-02T10:05:00Z"}
    return job(name, "Failed", "UserError", message, **times)


def waiting(name="wide"):
    said = "no node has as many free nvidia.com/gpu as spec.parallelism.gpusPerWorker asks for"
    return job(name, "Pending", "Unschedulable", said)


def run_record(name="quick", **more):
    """``run.json`` of a local run that is done."""
    attempt = {**FIRST, "worldSize": 2, "reason": "Completed", "exitCode": 0, "message": "done", "lastStep": 40}
    return {
        "name": name,
        "uid": "0b6c1f7e-0000-4000-8000-000000000000",
        "created": "2026-01-02T09:59:00Z",
        "spec": {**SPEC, "lora": {"rank": 8, "alpha": 32}, "model": {"source": "/models/small"}},
        "immutableHash": "h",
        "device": "CPU",
        "attempts": [attempt],
        "result": {
            "exitCode": 0,
            "reason": "Completed",
            "message": "eval loss 2.1 → 1.4",
            "progress": {**PROGRESS, "step": 40, "totalSteps": 40, "evalLoss": "1.4", "bestEvalLoss": "1.4"},
            "memory": {"measured": {"peak": GIB}},
            "adapter": {**ADAPTER, "uri": "out/adapter", "manifestUri": "out/manifest.json"},
        },
        **more,
    }


def ticking(*seconds):
    """Return a clock that reads these values, one a call."""
    times = iter(seconds)
    return lambda: next(times)


def console(**more):
    """Return a console that writes to a string."""
    return Console(file=io.StringIO(), width=120, markup=False, highlight=False, **more)
