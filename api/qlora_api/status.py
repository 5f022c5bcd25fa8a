"""``QLoRAJob.status``: what is known of a job. Written by the operator (or ``qlora run``) alone."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from qlora_api.base import Model
from qlora_api.batch import BatchSplit

Text = Annotated[str, StringConstraints(max_length=4096)]
Decimal = Annotated[str, StringConstraints(max_length=32)]
Count = Annotated[int, Field(ge=0)]
MAX_ATTEMPTS = 64


class ConditionType(StrEnum):
    PREPARED = "Prepared"
    """Model and data are checked; the plan is made."""
    RUNNING = "Running"
    """All ranks of an attempt train."""
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    """The adapter is verified and published."""
    FAILED = "Failed"


class Reason(StrEnum):
    """Why a condition is what it is, and why an attempt ended. A closed list."""

    PENDING = "Pending"
    QUEUED = "Queued"
    """Kueue has not admitted the attempt yet."""
    UNSCHEDULABLE = "Unschedulable"
    """No node can take the pods: too few free GPUs, a selector that matches nothing, a taint."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """A ResourceQuota of the namespace refuses the pods."""
    MISSING_REFERENCE = "MissingReference"
    """A Secret or PersistentVolumeClaim that the job names is not there."""
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    REFUSED = "Refused"
    """The API server refuses what the operator wants to make; the message is its own."""
    STARTING = "Starting"
    """Pods are placed and start."""
    BACKING_OFF = "BackingOff"
    """The next attempt waits."""
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    TRAINING = "Training"
    COMPLETED = "Completed"
    SUSPENDING = "Suspending"
    """Ranks write a checkpoint and leave."""
    SUSPENDED = "Suspended"
    BUDGET_REACHED = "BudgetReached"
    """policy.budgetGpuHours is used up; with more, the job goes on."""
    USER_ERROR = "UserError"
    """The manifest, the model or the rows must change. Never retried."""
    OUT_OF_DEVICE_MEMORY = "OutOfDeviceMemory"
    OUT_OF_HOST_MEMORY = "OutOfHostMemory"
    PREEMPTED = "Preempted"
    """The attempt was told to stop, and stopped with a checkpoint. Not counted against policy.maxRestarts."""
    NODE_LOST = "NodeLost"
    PEER_LOST = "PeerLost"
    """Ranks lost one of another pod, and no pod says more."""
    STALLED = "Stalled"
    NON_FINITE_LOSS = "NonFiniteLoss"
    CHECKPOINT_UNREADABLE = "CheckpointUnreadable"
    STORAGE_FAILED = "StorageFailed"
    """Disk full, or object storage out of reach after all retries."""
    ADAPTER_REJECTED = "AdapterRejected"
    """The publish gate found the adapter incomplete, not finite or untrained. Never retried: it would be the same."""
    CRASHED = "Crashed"
    DEADLINE_EXCEEDED = "DeadlineExceeded"


class Condition(Model):
    """As metav1.Condition."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: Reason
    message: Text = ""
    last_transition_time: datetime
    observed_generation: Count = 0


class Attempt(Model):
    """One try at the training; never changed once it has ended."""

    number: int = Field(ge=1)
    world_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    gradient_checkpointing: bool = False
    start_time: datetime
    running_time: datetime | None = None
    """When all its pods were ready: GPUs are held and paid for from then on."""
    end_time: datetime | None = None
    reason: Reason | None = None
    message: Text = ""
    exit_code: int | None = None
    node: Text = ""
    first_step: Count | None = None
    """Step from which it went on: 0, or that of a checkpoint."""
    last_step: Count | None = None


class Progress(Model):
    """Where the training stands; also the answer of ``GET /progress``, there with all fields."""

    step: Count = 0
    total_steps: Count = 0
    epoch: Decimal = "0"
    loss: Decimal | None = None
    eval_loss: Decimal | None = None
    best_eval_loss: Decimal | None = None
    learning_rate: Decimal | None = None
    tokens_per_second: Decimal | None = None
    """Real tokens, no padding, over all ranks."""
    eta_seconds: Count | None = None


class MemoryComponent(StrEnum):
    """What memory is for. One name per component, in predictions, measurements and metrics alike."""

    QUANTIZED_WEIGHTS = "quantizedWeights"
    """The base's linear layers but the head, as bitsandbytes packs them."""
    QUANTIZATION_CONSTANTS = "quantizationConstants"
    """absmax of each block of weights, and code tables."""
    UNQUANTIZED_WEIGHTS = "unquantizedWeights"
    """Embeddings, norms, head, biases and experts, frozen, in the compute type."""
    ADAPTER_WEIGHTS = "adapterWeights"
    GRADIENTS = "gradients"
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
    measured: dict[str, Count] = Field({}, max_length=32)


class PrepareResult(Model):
    """What Prepare decided, for whoever starts the trainers and for ``status``."""

    model_revision: Text
    """Exact: the commit on the Hub, a hash of the content elsewhere."""
    data_hash: Text
    train_rows: Count
    train_tokens: Count
    train_sequences: Count
    """Packs, or rows without packing: what globalBatchSize counts."""
    eval_rows: Count = 0
    truncated: Count = 0
    dropped: Count = 0
    fully_masked: Count = 0
    duplicates: Count = 0
    packing_efficiency: Decimal = "1"
    """Real tokens / slots of maxLength."""
    batch: BatchSplit
    gradient_checkpointing: bool
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
    manifest_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class QLoRAJobStatus(Model):
    """Observed state."""

    observed_generation: Count = 0
    state: ConditionType | Literal["Pending"] = "Pending"
    """The condition that speaks for the job, for ``kubectl get``."""
    reason: Reason = Reason.PENDING
    conditions: list[Condition] = Field([], max_length=8)
    attempts: list[Attempt] = Field([], max_length=MAX_ATTEMPTS)
    """The newest ones; what ended without counting against policy.maxRestarts is dropped first."""
    restarts: Count = 0
    gpu_seconds: Count = 0
    """Time of all GPUs over all attempts, without waiting."""
    earlier_gpu_seconds: Count = 0
    """Of attempts that are not listed any more."""
    start_time: datetime | None = None
    """Of the first attempt, or of Prepare."""
    completion_time: datetime | None = None
    prepared: PrepareResult | None = None
    progress: Progress | None = None
    memory: Memory | None = None
    eta: Annotated[str, StringConstraints(max_length=16)] = ""
    """Time left in words, for ``kubectl get``."""
    peak_memory: Annotated[str, StringConstraints(max_length=16)] = ""
    """Measured peak in words, for ``kubectl get``."""
    adapter: Adapter | None = None
