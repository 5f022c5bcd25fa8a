"""``QLoRAJob.status``: what is known of a job. Written by the operator (or ``qlora run``) alone."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, StringConstraints
from pydantic_core import CoreSchema

from qlora_api.base import Model
from qlora_api.batch import BatchSplit
from qlora_api.spec.learning import ComputeType

Text = Annotated[str, StringConstraints(max_length=4096)]
Decimal = Annotated[str, StringConstraints(max_length=32)]
Count = Annotated[int, Field(ge=0)]
MAX_ATTEMPTS = 64
NAME_PATTERN = r"^[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?$"
"""Of reasons, as in metav1.Condition."""


def _map_by(key: str) -> dict[str, Any]:
    """Have the API server take a list as a map: server-side apply then changes single entries."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class OpenEnum(StrEnum):
    """Names that are a closed list in code, and in the API any name: other versions of the operator know others."""

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
    """Model and data are checked; the plan is made."""
    RUNNING = "Running"
    """All ranks of an attempt train."""
    SUSPENDED = "Suspended"
    """No pod runs, because spec.suspend is set or the budget is used up."""
    SUCCEEDED = "Succeeded"
    """The adapter is verified and published."""
    FAILED = "Failed"
    """The job is over without an adapter; the message says why."""
    FINISHED = "Finished"
    """The job is over, whichever way: for ``kubectl wait --for=condition=Finished``."""
    READY = "Ready"
    """The adapter is published, for tools that know nothing of QLoRAJobs; until then the message says what goes on."""
    STALLED = "Stalled"
    """The job has failed and goes no further, for the same tools (kstatus)."""
    DEGRADED = "Degraded"
    """The job goes on, and something of it has no effect: fields or values that this operator does not know."""


class Reason(OpenEnum):
    """Reason of a condition, or of the end of an attempt. Later versions may have more."""

    PENDING = "Pending"
    """The operator has not processed the job yet."""
    QUEUED = "Queued"
    """A queue has not admitted the attempt, or Prepare, yet; the message names queue and Job."""
    UNSCHEDULABLE = "Unschedulable"
    """No node can take the pods: too few free GPUs, a selector that matches nothing, a taint."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """A ResourceQuota of the namespace refuses the pods."""
    MISSING_REFERENCE = "MissingReference"
    """A Secret or PersistentVolumeClaim that the job names is not there."""
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    """The trainer's image cannot be pulled: a wrong name, or no pull secret in this namespace."""
    REFUSED = "Refused"
    """The API server rejects an object that the operator creates; the message is the API server's."""
    STARTING = "Starting"
    """Pods are placed and start."""
    BACKING_OFF = "BackingOff"
    """The next attempt starts after a delay."""
    PREPARING = "Preparing"
    """Model and rows are checked in a pod without a GPU."""
    PREPARED = "Prepared"
    """Model and rows are valid; see status.prepared."""
    TRAINING = "Training"
    """All pods of the attempt are ready."""
    COMPLETED = "Completed"
    """The adapter is verified and published."""
    SUSPENDING = "Suspending"
    """The ranks save a checkpoint and exit."""
    SUSPENDED = "Suspended"
    """spec.suspend is true. An attempt that had run, and ended so, has a checkpoint."""
    BUDGET_REACHED = "BudgetReached"
    """policy.budgetGpuHours is used up; with more, the job goes on."""
    USER_ERROR = "UserError"
    """The manifest, the model or the rows must change. Never retried."""
    OUT_OF_DEVICE_MEMORY = "OutOfDeviceMemory"
    """A GPU's memory was not enough; the message says in which section, and the peak."""
    OUT_OF_HOST_MEMORY = "OutOfHostMemory"
    """The container took more memory than its limit; the kernel or the kubelet said so."""
    PREEMPTED = "Preempted"
    """The attempt was told to stop, and stopped with a checkpoint. Not counted against policy.maxRestarts."""
    NODE_LOST = "NodeLost"
    """A node went away, or a pod went away without a word."""
    PEER_LOST = "PeerLost"
    """The connection to a rank in another pod was lost, and no pod reported a cause."""
    STALLED = "Stalled"
    """A rank gave no sign of life for policy.stallTimeoutSeconds; the message names rank, node and section."""
    NON_FINITE_LOSS = "NonFiniteLoss"
    """The loss or a gradient is not a number; seen on all ranks before the update. Never retried."""
    CHECKPOINT_UNREADABLE = "CheckpointUnreadable"
    """No checkpoint is whole: each has a file that differs from its hash."""
    STORAGE_FAILED = "StorageFailed"
    """Disk full, or object storage out of reach after all retries."""
    ADAPTER_REJECTED = "AdapterRejected"
    """The publish gate found the adapter incomplete, not finite, untrained or worse than its base. Never retried."""
    CRASHED = "Crashed"
    """Any other end; the message has the last lines of the log."""
    NOT_UNDERSTOOD = "NotUnderstood"
    """The job has fields or values that this operator does not know, mostly since a newer version made them."""
    UNDERSTOOD = "Understood"
    """This operator knows all fields of the job again."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """All attempts together took longer than policy.activeDeadlineSeconds, or Prepare than the operator allows."""


class Condition(Model):
    """Condition of a job, as metav1.Condition."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: Reason
    message: Text = ""
    """Human-readable: what happened, and what to do."""
    last_transition_time: datetime
    """Last time that status changed."""
    observed_generation: Count = 0
    """metadata.generation of the job that this was said of."""


class Attempt(Model):
    """One try at the training; never changed once it has ended."""

    number: int = Field(ge=1)
    """From 1; names the attempt's Job, JOB-NUMBER."""
    job_uid: Annotated[str, StringConstraints(max_length=64)] | None = None
    """UID of that Job: only pods that it controls are the attempt's."""
    world_size: int = Field(ge=1)
    """Ranks."""
    micro_batch_size: int = Field(ge=1)
    """Sequences of one rank's forward pass."""
    gradient_accumulation_steps: int = Field(ge=1)
    """Forward passes of a rank for each optimizer step."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass."""
    grace_seconds: Count | None = None
    """terminationGracePeriodSeconds of its pods, where it is not the operator's own setting."""
    key_secret: Text = ""
    """Secret with the key that signs its checkpoints and its manifest; empty for attempts of earlier versions."""
    start_time: datetime
    """When the operator decided on it."""
    running_time: datetime | None = None
    """When all its pods were ready: GPUs are held and paid for from then on. Anew after a queue took them back."""
    end_time: datetime | None = None
    """When its end was observed; not set while it runs."""
    reason: Reason | None = None
    message: Text = ""
    """Termination message of the pod that caused the end, or the operator's own finding."""
    exit_code: int | None = None
    """Exit code of that pod."""
    node: Text = ""
    """Nodes of its pods while it runs; then that of the pod that ended it."""
    compute_type: ComputeType | None = None
    """Type in which the base computed, as resolved on the device."""
    first_step: Count | None = None
    """Step from which it went on: 0, or that of a checkpoint."""
    last_step: Count | None = None
    """Newest step that is known of."""


class Progress(Model):
    """Progress of the training; also the answer of ``GET /progress``, there with all fields."""

    step: Count = 0
    """Optimizer steps done, over all attempts."""
    total_steps: Count = 0
    """Optimizer steps of the whole job."""
    epoch: Decimal = "0"
    """Passes over the training rows, with fraction."""
    loss: Decimal | None = None
    """Mean training loss of the last step's target tokens, in nats."""
    eval_loss: Decimal | None = None
    """Loss of the newest evaluation."""
    best_eval_loss: Decimal | None = None
    """Lowest evaluation loss so far, that of the published checkpoint."""
    learning_rate: Decimal | None = None
    """Learning rate of the last step."""
    tokens_per_second: Decimal | None = None
    """Real tokens, no padding, over all ranks."""
    eta_seconds: Count | None = None
    """Time left, by the steps so far."""


class MemoryComponent(StrEnum):
    """Use of memory. One name per component, in predictions, measurements and metrics alike."""

    QUANTIZED_WEIGHTS = "quantizedWeights"
    """The base's linear layers but the head, as bitsandbytes packs them."""
    QUANTIZATION_CONSTANTS = "quantizationConstants"
    """absmax of each block of weights, and code tables."""
    UNQUANTIZED_WEIGHTS = "unquantizedWeights"
    """Embeddings, norms, head, biases and experts, frozen, in the compute type."""
    ADAPTER_WEIGHTS = "adapterWeights"
    """A and B, biases and magnitudes that learn, in fp32."""
    GRADIENTS = "gradients"
    """Of what learns, in fp32."""
    OPTIMIZER_STATE = "optimizerState"
    """Moments, and under ZeRO 1 and 2 the fp32 copy of the rank's partition."""
    ACTIVATIONS = "activations"
    """Held from the forward to the backward pass; with gradient checkpointing the layers' inputs."""
    BACKWARD_WORKSPACE = "backwardWorkspace"
    """One layer's gradients, and with gradient checkpointing all that it computes again."""
    LOGITS = "logits"
    """Head and loss."""
    DEQUANTIZED_WEIGHTS = "dequantizedWeights"
    """The weight of the layer at work, brought back to the compute type."""
    COLLECTIVE_BUFFERS = "collectiveBuffers"
    """DeepSpeed's buckets, and under ZeRO 3 the parameters it gathers."""
    LIBRARY_WORKSPACES = "libraryWorkspaces"
    """cuBLAS."""
    CUDA_CONTEXT = "cudaContext"
    """The driver's and NCCL's own; no allocation of PyTorch's."""
    FRAGMENTATION = "fragmentation"
    """Reserve for gaps between allocations."""
    PEAK = "peak"
    """Highest allocation on the device; on a CPU the highest resident set of the process."""


class Memory(Model):
    """Bytes per rank, the largest over the ranks."""

    predicted: dict[str, Count] = Field({}, max_length=32)
    """By component, as planned for this attempt's batch."""
    measured: dict[str, Count] = Field({}, max_length=32)
    """By component, the highest so far; peak is the device's own."""


class PrepareResult(Model):
    """Decisions of Prepare, for whoever starts the trainers and for ``status``."""

    model_revision: Text
    """Exact: the commit on the Hub, a hash of the content elsewhere."""
    data_hash: Text
    """Of the rows, the tokenizer and all that decides how they become tokens."""
    train_rows: Count
    """Training rows that are learned from."""
    train_tokens: Count
    """Their tokens."""
    train_sequences: Count
    """Packs, or rows without packing: what globalBatchSize counts."""
    steps_per_epoch: Count = 0
    eval_rows: Count = 0
    """Rows held out."""
    truncated: Count = 0
    """Rows that lost their tail."""
    dropped: Count = 0
    """Rows left out because they are too long."""
    fully_masked: Count = 0
    """Rows left out because no token of theirs counts."""
    duplicates: Count = 0
    """Training rows that repeat an earlier one token by token; they are kept."""
    packing_efficiency: Decimal = "1"
    """Real tokens / slots of maxLength."""
    batch: BatchSplit
    gradient_checkpointing: bool
    """Whether the first attempt computes activations again, as planned or as the job says."""
    quantized: Text = ""
    """Share of the base's weights that are quantized. Empty: it cannot be told."""
    adapted: Text = ""
    """Of the base's linear layers and its layers with experts, those with an adapter. Empty: it cannot be told."""
    memory: dict[str, Count] = Field({}, max_length=32)
    """Predicted bytes of one rank by component."""
    expected_gpu_hours: Decimal | None = None
    """Time of all GPUs together that training should take, good to a factor of 1.5. None: the GPU is not known."""
    seconds: Decimal = "0"
    """Time that Prepare took; near zero when everything was there already."""


class Adapter(Model):
    """The published adapter."""

    uri: Text
    """Folder of the adapter in PEFT's layout."""
    manifest_uri: Text
    """The manifest that declares it: files, sizes, hashes, figures, configuration."""
    manifest_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the manifest."""


class QLoRAJobStatus(Model):
    """Observed state."""

    observed_generation: Count = 0
    """metadata.generation that the operator has acted on."""
    state: ConditionType | Literal["Pending"] = "Pending"
    """The condition that summarizes the job's state, for ``kubectl get``."""
    reason: Reason = Reason.PENDING
    conditions: list[Condition] = Field([], max_length=16, json_schema_extra=_map_by("type"))
    attempts: list[Attempt] = Field([], max_length=MAX_ATTEMPTS, json_schema_extra=_map_by("number"))
    """The newest ones; what ended without counting against policy.maxRestarts is dropped first."""
    restarts: Count = 0
    """Attempts that count against policy.maxRestarts."""
    total_restarts: Count = 0
    """Attempts that followed another one, for whatever reason."""
    gpu_seconds: Count = 0
    """Time of all GPUs over all attempts, without waiting."""
    earlier_gpu_seconds: Count = 0
    """GPU-seconds of attempts that are no longer listed, and of the open one before a queue took its GPUs back."""
    grace_seconds: Count | None = None
    """Seconds that pods of the next attempt need to save a checkpoint after the stop signal, by the longest step and
    save so far. Set only where it is more than the operator's own setting (trainer.graceSeconds); at most 900."""
    stop_seconds: Count | None = None
    """Seconds that the newest attempt's ranks need to checkpoint and exit, by its longest step and save. To keep to
    policy.budgetGpuHours, the stop signal is sent this much earlier."""
    start_time: datetime | None = None
    """Start of the first attempt, or of Prepare."""
    completion_time: datetime | None = None
    """When the job succeeded or failed."""
    prepared: PrepareResult | None = None
    expected_cost: Decimal | None = None
    """Money for prepared.expectedGpuHours, by the operator's pricePerGpuHour and in its currency."""
    progress: Progress | None = None
    memory: Memory | None = None
    memory_correction: Decimal | None = None
    """What the plan multiplied its bytes by: measured over predicted, as earlier jobs of this cluster on such GPUs had
    it. Between 0.95 and 1.15; not set where nothing was learned. ``memory.predicted`` is without it."""
    eta: Annotated[str, StringConstraints(max_length=16)] = ""
    """Time left in words, for ``kubectl get``."""
    peak_memory: Annotated[str, StringConstraints(max_length=16)] = ""
    """Measured peak in words, for ``kubectl get``."""
    adapter: Adapter | None = None
