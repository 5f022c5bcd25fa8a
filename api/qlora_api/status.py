"""``QLoRAJob.status``, the observed state of a job. Only the operator (or ``qlora run``) writes it."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, StringConstraints
from pydantic_core import CoreSchema

from qlora_api.base import Model, Timestamp
from qlora_api.batch import BatchSplit
from qlora_api.spec.learning import ComputeType
from qlora_api.spec.tracking import SinkType

Text = Annotated[str, StringConstraints(max_length=4096)]
Decimal = Annotated[str, StringConstraints(max_length=32)]
Count = Annotated[int, Field(ge=0)]
MAX_ATTEMPTS = 64
NAME_PATTERN = r"^[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?$"
"""Pattern of a reason in metav1.Condition."""


def map_by(key: str) -> dict[str, Any]:
    """Have the API server take a list as a map: server-side apply then changes single entries."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class OpenEnum(StrEnum):
    """An enum in code, but any name in the API: other versions of the operator may have other names."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        """Keep a name that another version wrote."""
        if not isinstance(value, str) or not re.fullmatch(NAME_PATTERN, value):
            return None
        other = str.__new__(cls, value)
        other._name_, other._value_ = value, value
        return other

    @classmethod
    def __get_pydantic_json_schema__(cls, _core: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": NAME_PATTERN, "maxLength": 64, "description": cls.__doc__}


class ConditionType(OpenEnum):
    """Type of the condition."""

    PREPARED = "Prepared"
    """Model and rows are valid, and the memory plan is made."""
    RUNNING = "Running"
    """All pods of an attempt are ready. Its ranks load the model, train, evaluate or publish."""
    SUSPENDED = "Suspended"
    """No pod runs, because spec.suspend is set, the budget is used up or policy.pauseAtStep is reached."""
    SUCCEEDED = "Succeeded"
    """The adapter is verified and published."""
    FAILED = "Failed"
    """The job ended without an adapter; the message says why."""
    FINISHED = "Finished"
    """The job has succeeded or failed; for ``kubectl wait --for=condition=Finished``."""
    READY = "Ready"
    """The adapter is published; until then, the message says what the job is doing. For tools that use kstatus."""
    STALLED = "Stalled"
    """The job has failed, for tools that use kstatus. Not to be confused with the reason ``Stalled``."""
    DEGRADED = "Degraded"
    """The job continues, but some fields or values are unknown to this operator and have no effect."""


class Reason(OpenEnum):
    """Reason of a condition, or of the end of an attempt. Later versions may have more."""

    PENDING = "Pending"
    """The operator has not processed the job yet."""
    QUEUED = "Queued"
    """A queue has not admitted the attempt or Prepare yet; the message names the queue and the Job."""
    UNSCHEDULABLE = "Unschedulable"
    """No node can take the pods: too few free GPUs, a selector that matches nothing, a taint."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """A ResourceQuota of the namespace refuses the pods."""
    MISSING_REFERENCE = "MissingReference"
    """A Secret or PersistentVolumeClaim that the job names does not exist."""
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    """The trainer's image cannot be pulled: a wrong name, or no pull secret in this namespace."""
    REFUSED = "Refused"
    """The API server rejected an object of the job; the message is the API server's."""
    STARTING = "Starting"
    """Pods are scheduled and starting."""
    BACKING_OFF = "BackingOff"
    """The next attempt starts after a delay."""
    PREPARING = "Preparing"
    """Model and rows are being checked, in a pod without a GPU. The message names the stage once the pod runs."""
    PREPARED = "Prepared"
    """Model and rows are valid; see status.prepared."""
    TRAINING = "Training"
    """All pods of the attempt are ready. The message says what the ranks are doing."""
    COMPLETED = "Completed"
    """The adapter is verified and published."""
    SUSPENDING = "Suspending"
    """The ranks save a checkpoint and exit."""
    SUSPENDED = "Suspended"
    """spec.suspend is true. If an attempt was running, it saved a checkpoint first."""
    BUDGET_REACHED = "BudgetReached"
    """policy.budgetGpuHours is used up; raise it to resume the job."""
    PAUSED = "Paused"
    """policy.pauseAtStep is reached and its checkpoint is saved; raise or remove it to resume the job."""
    SEARCHING = "Searching"
    """A sweep's trials are created, running, or waiting for GPUs."""
    TRIALS_FAILED = "TrialsFailed"
    """More trials of a sweep than spec.maxFailedTrials have failed, or none has succeeded."""
    USER_ERROR = "UserError"
    """The manifest, the model or the rows must change. No further attempt is made."""
    OUT_OF_DEVICE_MEMORY = "OutOfDeviceMemory"
    """A GPU ran out of memory; the message has the section and the peak."""
    OUT_OF_HOST_MEMORY = "OutOfHostMemory"
    """The container exceeded its memory limit, as reported by the kernel or the kubelet."""
    PREEMPTED = "Preempted"
    """The pods were told to stop: preemption, eviction, node drain or deletion. A checkpoint is saved first if a step
    was done."""
    NODE_LOST = "NodeLost"
    """A node was lost, or a pod disappeared without a termination message."""
    PEER_LOST = "PeerLost"
    """The connection to a rank in another pod was lost, and no pod reported a cause."""
    STALLED = "Stalled"
    """A rank sent no heartbeat for policy.stallTimeoutSeconds; the message names it. Not the condition ``Stalled``."""
    NON_FINITE_LOSS = "NonFiniteLoss"
    """The loss or a gradient is not finite, detected on all ranks before the update. No further attempt is made."""
    CHECKPOINT_UNREADABLE = "CheckpointUnreadable"
    """No checkpoint is intact: each has a file that does not match its hash."""
    STORAGE_FAILED = "StorageFailed"
    """The disk is full, or object storage could not be reached after all retries."""
    ADAPTER_REJECTED = "AdapterRejected"
    """The publish gate found the adapter incomplete, not finite, untrained or worse than its base. No further attempt
    is made."""
    CRASHED = "Crashed"
    """Any other failure; the message has the last lines of the log."""
    NOT_UNDERSTOOD = "NotUnderstood"
    """The job has fields or values that this operator does not know, usually because a newer version wrote them."""
    UNDERSTOOD = "Understood"
    """This operator knows all fields of the job again."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """Training took longer than policy.activeDeadlineSeconds, or Prepare took longer than the operator allows."""


class Condition(Model):
    """Condition of a job, as metav1.Condition."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: Reason
    message: Text = ""
    """Human-readable: what happened, and what to do."""
    last_transition_time: Timestamp
    """Last time that status changed."""
    observed_generation: Count = 0
    """metadata.generation that this condition was set for."""


class Attempt(Model):
    """One attempt to train. It never changes after it has ended."""

    number: int = Field(ge=1)
    """Number of the attempt, from 1. Its Job is called JOB-NUMBER."""
    job_uid: Annotated[str, StringConstraints(max_length=64)] | None = None
    """UID of that Job. Only pods that it controls belong to the attempt."""
    world_size: int = Field(ge=1)
    """Number of ranks."""
    micro_batch_size: int = Field(ge=1)
    """Sequences per forward pass on one rank."""
    gradient_accumulation_steps: int = Field(ge=1)
    """Forward passes per optimizer step on each rank."""
    gradient_checkpointing: bool = False
    """True if activations are recomputed in the backward pass."""
    grace_seconds: Count | None = None
    """terminationGracePeriodSeconds of its pods, if it differs from the operator's setting."""
    key_secret: Text = ""
    """Secret with the key that signs its checkpoints and adapter manifest; empty for attempts of earlier versions."""
    start_time: Timestamp
    """Time at which the operator decided to start it."""
    running_time: Timestamp | None = None
    """Time at which all its pods were ready; GPU time counts from then. Set again if a queue took the GPUs back and
    readmitted the attempt."""
    end_time: Timestamp | None = None
    """Time at which its end was observed; not set while it runs."""
    reason: Reason | None = None
    message: Text = ""
    """Termination message of the pod that caused the end, or the operator's own finding."""
    exit_code: int | None = None
    """Exit code of that pod."""
    node: Text = ""
    """While it runs, the nodes of its pods; afterwards, the node of the pod that caused the end."""
    compute_type: ComputeType | None = None
    """Compute type of the base, as resolved on the device."""
    first_step: Count | None = None
    """Step at which it started: 0, or the step of a checkpoint."""
    last_step: Count | None = None
    """Last step that was reported."""
    loss: Decimal | None = None
    """Training loss of the last step, once the attempt has ended with a termination message."""
    best_eval_loss: Decimal | None = None
    """Lowest evaluation loss of the job at that time."""


class Progress(Model):
    """Progress of the training. ``GET /progress`` returns it too, with more fields."""

    step: Count = 0
    """Optimizer steps done, over all attempts."""
    total_steps: Count = 0
    """Optimizer steps of the whole job."""
    epoch: Decimal = "0"
    """Passes over the training rows, with a fraction."""
    loss: Decimal | None = None
    """Mean training loss of the last step's target tokens, in nats."""
    eval_loss: Decimal | None = None
    """Loss of the newest evaluation."""
    best_eval_loss: Decimal | None = None
    """Lowest evaluation loss so far, that of the published checkpoint."""
    learning_rate: Decimal | None = None
    """Learning rate of the last step."""
    tokens_per_second: Decimal | None = None
    """Tokens per second over all ranks, padding not counted."""
    eta_seconds: Count | None = None
    """Estimated time left, from the steps so far."""


class JobStage(Model):
    """Stage of a job that is not a training step and may take minutes."""

    name: Annotated[str, StringConstraints(max_length=128)]
    """Name of the stage, such as ``tokenizing the rows``."""
    start_time: Timestamp
    """Time at which it began."""


class MemoryComponent(StrEnum):
    """Component of memory; the same name in predictions, measurements and metrics."""

    QUANTIZED_WEIGHTS = "quantizedWeights"
    """The base's linear layers except the head, and with NF4 and FP4 its experts, as packed by bitsandbytes."""
    QUANTIZATION_CONSTANTS = "quantizationConstants"
    """absmax of each block of weights, and code tables."""
    UNQUANTIZED_WEIGHTS = "unquantizedWeights"
    """Embeddings, norms, head, biases, routers, skipModules, and with INT8 experts: frozen, in the compute type."""
    ADAPTER_WEIGHTS = "adapterWeights"
    """A and B, and trained biases and magnitudes, in fp32."""
    GRADIENTS = "gradients"
    """Gradients of all trained weights, in fp32."""
    OPTIMIZER_STATE = "optimizerState"
    """Moments, and with ZeRO 1 and 2 the fp32 copy of the rank's partition."""
    ACTIVATIONS = "activations"
    """Activations kept from the forward to the backward pass; with gradient checkpointing only the layers' inputs."""
    BACKWARD_WORKSPACE = "backwardWorkspace"
    """One layer's gradients, and with gradient checkpointing the activations that it recomputes."""
    LOGITS = "logits"
    """The head's output and the loss."""
    DEQUANTIZED_WEIGHTS = "dequantizedWeights"
    """The weight of the current layer, dequantized to the compute type."""
    COLLECTIVE_BUFFERS = "collectiveBuffers"
    """DeepSpeed's buckets, and with ZeRO 3 the gathered parameters."""
    LIBRARY_WORKSPACES = "libraryWorkspaces"
    """Workspaces of cuBLAS."""
    CUDA_CONTEXT = "cudaContext"
    """Memory of the driver and of NCCL, outside PyTorch's allocator."""
    FRAGMENTATION = "fragmentation"
    """Reserve for gaps between allocations."""
    PEAK = "peak"
    """Highest allocation on the device; on a CPU the highest resident set of the process."""


class Memory(Model):
    """Bytes per rank: the maximum over all ranks."""

    predicted: dict[str, Count] = Field({}, max_length=32)
    """Predicted bytes by component, for this attempt's batch."""
    measured: dict[str, Count] = Field({}, max_length=32)
    """Measured bytes by component, the highest so far; peak is measured by the device."""


class PrepareResult(Model):
    """Findings and decisions of Prepare."""

    model_revision: Text
    """Exact revision of the model: the commit on the Hub, or a hash of the content elsewhere."""
    data_hash: Text
    """Hash of the rows, the tokenizer and all settings that affect tokenization."""
    train_rows: Count
    """Training rows used."""
    train_tokens: Count
    """Tokens of those rows."""
    train_sequences: Count
    """Sequences, as globalBatchSize counts them: packs, or rows without packing."""
    steps_per_epoch: Count = 0
    """Optimizer steps of one epoch."""
    eval_rows: Count = 0
    """Evaluation rows."""
    truncated: Count = 0
    """Rows that lost their tail."""
    dropped: Count = 0
    """Rows left out because they are too long."""
    fully_masked: Count = 0
    """Rows left out because none of their tokens count in the loss."""
    duplicates: Count = 0
    """Training rows with the same tokens as an earlier row; they are kept."""
    packing_efficiency: Decimal = "1"
    """Share of all positions in the packed sequences that hold a token."""
    batch: BatchSplit
    gradient_checkpointing: bool
    """True if the first attempt recomputes activations, as planned or as the job says."""
    quantized: Text = ""
    """Share of the base that is quantized, as a sentence; empty if unknown."""
    adapted: Text = ""
    """The base's linear layers and experts that get an adapter, as a sentence; empty if unknown."""
    memory: dict[str, Count] = Field({}, max_length=32)
    """Predicted bytes of one rank, by component."""
    expected_gpu_hours: Decimal | None = None
    """Estimated GPU-hours of the training, within a factor of 1.5. Not set if the GPU is unknown."""
    seconds: Decimal = "0"
    """Time that Prepare took, in seconds; near zero if the results of an earlier job were reused."""


class Adapter(Model):
    """The published adapter."""

    uri: Text
    """Folder of the adapter in PEFT's layout."""
    manifest_uri: Text
    """The adapter manifest: files, sizes, hashes, metrics and configuration."""
    manifest_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the adapter manifest."""


class TaskResult(Model):
    """Result of a task of spec.evaluate, of the base and of the adapter."""

    name: Annotated[str, StringConstraints(max_length=128)]
    """Name of the task."""
    metric: Annotated[str, StringConstraints(max_length=64)]
    """Metric of the values."""
    base: Decimal | None = None
    """Value of the base, in the trained quantization, before the first step."""
    adapter: Decimal | None = None
    """Value of the adapter that is published."""
    standard_error: Decimal | None = None
    """Standard error of the adapter's value."""
    examples: Count = 0
    """Number of examples evaluated."""


class TrackedRun(Model):
    """The job's run in a tracking tool."""

    type: SinkType
    """Type of the tool, as in spec.tracking."""
    url: Annotated[str, StringConstraints(max_length=512)] = ""
    """URL of the run; empty until it is created."""
    message: Annotated[str, StringConstraints(max_length=256)] = ""
    """Reason why the tool does not have the newest steps; empty while it has them."""


class QLoRAJobStatus(Model):
    """Observed state."""

    observed_generation: Count = 0
    """metadata.generation that the operator has acted on."""
    state: ConditionType | Literal["Pending"] = "Pending"
    """Pending, or the condition that summarizes the job: Running, Suspended, Succeeded or Failed."""
    reason: Reason = Reason.PENDING
    conditions: list[Condition] = Field([], max_length=16, json_schema_extra=map_by("type"))
    attempts: list[Attempt] = Field([], max_length=MAX_ATTEMPTS, json_schema_extra=map_by("number"))
    """The newest attempts. If there are too many, those that count against no limit are dropped first."""
    restarts: Count = 0
    """Number of attempts that count against policy.maxRestarts."""
    total_restarts: Count = 0
    """Number of all attempts after the first, for any reason."""
    gpu_seconds: Count = 0
    """GPU-seconds of all attempts; waiting does not count."""
    earlier_gpu_seconds: Count = 0
    """GPU-seconds of attempts that are no longer listed, and of the current one before a queue reclaimed its GPUs."""
    grace_seconds: Count | None = None
    """terminationGracePeriodSeconds of the next attempt's pods, estimated from the longest step and checkpoint so far.
    Set only if it is more than the operator's setting (trainer.graceSeconds); at most 900."""
    stop_seconds: Count | None = None
    """Time that the newest attempt needs to checkpoint and exit, estimated from its longest step and checkpoint. The
    stop signal is sent this long before policy.budgetGpuHours is used up."""
    start_time: Timestamp | None = None
    """Start of the first attempt, or of Prepare."""
    completion_time: Timestamp | None = None
    """Time at which the job succeeded or failed."""
    prepared: PrepareResult | None = None
    expected_cost: Decimal | None = None
    """Cost of prepared.expectedGpuHours at the operator's pricePerGpuHour, in its currency."""
    stage: JobStage | None = None
    """Current stage of Prepare, or of an attempt that loads, evaluates, saves or publishes; not set while it trains."""
    progress: Progress | None = None
    memory: Memory | None = None
    memory_correction: Decimal | None = None
    """Factor applied to the predicted memory: measured over predicted, from earlier jobs on the same kind of GPU.
    Between 0.95 and 1.15; not set without such jobs. ``memory.predicted`` does not include it."""
    eta: Annotated[str, StringConstraints(max_length=16)] = ""
    """Estimated time left as text, for ``kubectl get``."""
    peak_memory: Annotated[str, StringConstraints(max_length=16)] = ""
    """Measured peak memory as text, for ``kubectl get``."""
    adapter: Adapter | None = None
    tasks: list[TaskResult] = Field([], max_length=8, json_schema_extra=map_by("name"))
    """Results of spec.evaluate."""
    tracking: list[TrackedRun] = Field([], max_length=3, json_schema_extra=map_by("type"))
    """The run in each tool of spec.tracking, as last reported."""
