"""``QLoRAJob.spec``: every field, default, bound and reason. The CRD and ``qlora explain`` are generated from here.

Read in the order of a manifest: model, dataset, quantization, lora, training, parallelism, checkpoint, output,
policy, scheduling.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints

from qlora_api.base import Model, Rule, decimal

REMOTE_SCHEMES = ("hf", "s3", "gs", "az", "pvc")
STORE_SCHEMES = ("s3", "gs", "az", "pvc")


def _known_scheme(value: str) -> str:
    scheme, separator, _ = value.partition("://")
    if separator and scheme not in (*REMOTE_SCHEMES, "file"):
        raise ValueError(
            f'scheme "{scheme}://" is not known; use {", ".join(s + "://" for s in REMOTE_SCHEMES)} or a local path'
        )
    return value


def _remote_only(schemes: tuple[str, ...]) -> list[dict[str, str]]:
    names = ", ".join(f"{s}://" for s in schemes)
    return [
        {
            "rule": f"self.matches('^({'|'.join(schemes)})://.+')",
            "message": f"must start with one of {names}; a local path works only with 'qlora run'",
        }
    ]


Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_known_scheme)]
Source = Annotated[Uri, Field(json_schema_extra={"x-kubernetes-validations": _remote_only(REMOTE_SCHEMES)})]
Destination = Annotated[Uri, Field(json_schema_extra={"x-kubernetes-validations": _remote_only(STORE_SCHEMES)})]
Name = Annotated[str, StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Label = Annotated[str, StringConstraints(max_length=317)]

# --------------------------------------------------------------------------------------------------------------- model


class ModelSpec(Model):
    """The base model. It is frozen: only the adapter learns."""

    source: Source
    """Where the base model is: hf://org/name@revision, s3://bucket/key, gs://…, az://…, pvc://claim/path, or a local
    folder with 'qlora run'. Safetensors only; repositories that bring code are refused."""
    credentials: Name | None = None
    """Secret in the job's namespace with the source's credentials as environment variables. The Secrets of a
    job make one environment, in the order model, dataset.train, output: of two with the same key the later counts."""


# ------------------------------------------------------------------------------------------------------------- dataset


class DatasetFormat(StrEnum):
    TEXT = "Text"
    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    INSTRUCTION = "Instruction"


class LossOn(StrEnum):
    ALL = "All"
    COMPLETION = "Completion"
    ASSISTANT = "Assistant"


class LongRows(StrEnum):
    FAIL = "Fail"
    TRUNCATE = "Truncate"
    DROP = "Drop"


class Columns(Model):
    """Names of the dataset's columns; only those of the chosen format are read."""

    text: Column = "text"
    """Text: the text."""
    messages: Column = "messages"
    """Messages: a list of {role, content}."""
    prompt: Column = "prompt"
    """PromptCompletion: what is given."""
    completion: Column = "completion"
    """PromptCompletion: what is to be learned."""
    instruction: Column = "instruction"
    """Instruction: the task."""
    input: Column = "input"
    """Instruction: the optional context; the column may be missing."""
    output: Column = "output"
    """Instruction: what is to be learned."""


class DatasetSource(Model):
    source: Source
    """A JSONL, Parquet or CSV file, a folder of them, or a folder written by datasets.save_to_disk."""
    credentials: Name | None = None
    """Secret in the job's namespace with the source's credentials as environment variables. The Secrets of a
    job make one environment, in the order model, dataset.train, output: of two with the same key the later counts."""


class EvaluationData(Model):
    """Rows held out for evaluation: an own source, or a fraction of the training rows."""

    source: Source | None = None
    """Own evaluation rows, in the same format as the training rows."""
    fraction: decimal(0, 0.5, low_included=False) | None = None  # type: ignore[valid-type]
    """Share of the training rows held out, chosen by training.seed."""
    rules: ClassVar = (
        Rule(
            "has(self.source) != has(self.fraction)",
            "set exactly one of source (own rows) and fraction (share of the training rows)",
            "fraction",
            lambda e: (e.source is None) != (e.fraction is None),
        ),
    )


class Tolerance(Model):
    """Shares of the rows above which Prepare ends the job, before a GPU is held. Unset: any share is taken."""

    truncated: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Rows that lose their tail, with longRows Truncate."""
    dropped: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Rows left out as too long, with longRows Drop."""
    fully_masked: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Rows left out because none of their tokens counts."""
    duplicates: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Training rows that repeat an earlier one token by token."""
    eval_in_train: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Evaluation rows that are training rows too."""


class DatasetSpec(Model):
    """What is learned, and which tokens count."""

    train: DatasetSource
    """The rows to learn from."""
    eval: EvaluationData | None = None
    """Evaluation rows. Without them there is no eval loss and no early stopping."""
    format: DatasetFormat
    """Text, Messages (chat), PromptCompletion or Instruction (instruction, input, output)."""
    columns: Columns = Columns()
    chat_template: Annotated[str, StringConstraints(min_length=1, max_length=32768)] | None = None
    """Jinja template for Messages; default: the tokenizer's own. Mark the assistant's tokens with
    {% generation %} … {% endgeneration %}; without the mark they are found by rendering turn by turn."""
    loss_on: LossOn | None = None
    """Tokens that count: All, Completion (PromptCompletion and Instruction) or Assistant (Messages).
    Default: All for Text, Assistant for Messages, else Completion."""
    max_length: int = Field(2048, ge=16, le=1048576)
    """Longest sequence in tokens; with packing also the length of a pack."""
    long_rows: LongRows = LongRows.FAIL
    """A row longer than maxLength ends the job (Fail), loses its tail (Truncate) or is left out (Drop)."""
    packing: bool = True
    """Put several rows into one sequence of maxLength; rows never see each other."""
    tolerance: Tolerance = Tolerance()
    """How much of the rows may be lost or repeated."""
    rules: ClassVar = (
        Rule(
            "!has(self.lossOn) || self.lossOn == 'All' || (self.lossOn == 'Assistant') == (self.format == 'Messages')",
            "lossOn Assistant goes with format Messages, Completion with PromptCompletion and Instruction; "
            "All goes with every format",
            "lossOn",
            lambda d: (
                d.loss_on in (None, LossOn.ALL)
                or (d.loss_on is LossOn.ASSISTANT) == (d.format is DatasetFormat.MESSAGES)
            ),
        ),
        Rule(
            "!has(self.lossOn) || self.lossOn == 'All' || self.format != 'Text'",
            "format Text has no completion: lossOn must be All",
            "lossOn",
            lambda d: d.loss_on in (None, LossOn.ALL) or d.format is not DatasetFormat.TEXT,
        ),
        Rule(
            "!has(self.chatTemplate) || self.format == 'Messages'",
            "chatTemplate goes with format Messages",
            "chatTemplate",
            lambda d: d.chat_template is None or d.format is DatasetFormat.MESSAGES,
        ),
        Rule(
            "!has(self.tolerance.evalInTrain) || has(self.eval)",
            "tolerance.evalInTrain needs evaluation rows: set dataset.eval",
            "tolerance.evalInTrain",
            lambda d: d.tolerance.eval_in_train is None or d.eval is not None,
        ),
    )

    @property
    def effective_loss_on(self) -> LossOn:
        """``loss_on`` with its default by format."""
        if self.loss_on is not None:
            return self.loss_on
        by_format = {DatasetFormat.TEXT: LossOn.ALL, DatasetFormat.MESSAGES: LossOn.ASSISTANT}
        return by_format.get(self.format, LossOn.COMPLETION)


# -------------------------------------------------------------------------------------------------------- quantization


class QuantizationType(StrEnum):
    NF4 = "NF4"
    FP4 = "FP4"
    INT8 = "INT8"
    NONE = "None"


class ComputeType(StrEnum):
    BFLOAT16 = "BFloat16"
    FLOAT32 = "Float32"


class QuantizationSpec(Model):
    """How the frozen base is held. Dettmers et al. 2023 (QLoRA), sections 3 and 4."""

    type: QuantizationType = QuantizationType.NF4
    """NF4 (4-bit normal float), FP4, INT8 (LLM.int8) or None (16-bit LoRA, for comparison). A base that is already
    4-bit on disk is loaded as it is and must be of this type."""
    double_quantization: bool = True
    """Quantize the absmax constants of NF4 and FP4 too: 0.127 instead of 0.5 bits a parameter."""
    compute_type: ComputeType = ComputeType.BFLOAT16
    """Type in which the base computes; Float32 for comparison and for CPUs without bf16."""


# ---------------------------------------------------------------------------------------------------------------- lora


class LoRABias(StrEnum):
    NONE = "None"
    ALL = "All"
    LORA_ONLY = "LoRAOnly"


class LoRASpec(Model):
    """The adapter: W + (alpha / rank)·B·A. Hu et al. 2021, section 4.1."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank r of the update B·A."""
    alpha: int = Field(32, ge=1, le=65536)
    """Numerator of the scale alpha / rank."""
    dropout: decimal(0, 1, high_included=False) = "0"  # type: ignore[valid-type]
    """Probability of dropping an input of A."""
    target_modules: list[Annotated[str, StringConstraints(min_length=1, max_length=253)]] | None = Field(
        None, min_length=1, max_length=64
    )
    """Names (or dotted suffixes) of the linear layers that get an adapter. Default: all but the head, as QLoRA
    (section 4) found necessary to match full fine-tuning."""
    bias: LoRABias = LoRABias.NONE
    """Biases that learn too: None, All, or LoRAOnly (those of adapted layers)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead. Kalajdzievski 2023."""
    dora: bool = False
    """Learn magnitude and direction apart. Liu et al. 2024 (DoRA)."""


# ------------------------------------------------------------------------------------------------------------ training


class Schedule(StrEnum):
    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


class Optimizer(StrEnum):
    PAGED_ADAMW_8BIT = "PagedAdamW8Bit"
    PAGED_ADAMW_32BIT = "PagedAdamW32Bit"
    ADAMW_8BIT = "AdamW8Bit"
    ADAMW = "AdamW"


class GradientCheckpointing(StrEnum):
    AUTO = "Auto"
    FULL = "Full"
    NONE = "None"


class EvaluationSpec(Model):
    """When the held-out rows are looked at, and what follows."""

    every_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Steps between evaluations. Default: once an epoch. There is one before the first step and one after the last."""
    patience: int | None = Field(None, ge=1, le=1000)
    """Stop after this many evaluations in a row without a better loss. Default: never."""
    prompts: list[Prompt] = Field([], max_length=8)
    """What base and adapter are asked before the first step and after the last, 64 tokens an answer: a user's message,
    an instruction, a prompt or a beginning, as dataset.format has it. The report shows both side by side, and the
    answers are published with the adapter."""


class TrainingSpec(Model):
    """The loop: how long, how fast, in what portions."""

    epochs: int | None = Field(None, ge=1, le=1000)
    """Passes over the training rows. Exactly one of epochs and maxSteps is set."""
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    """Optimizer steps."""
    learning_rate: decimal(0, 1, low_included=False) = "2e-4"  # type: ignore[valid-type]
    """Peak learning rate."""
    schedule: Schedule = Schedule.COSINE
    """Course of the learning rate after warmup: to zero (Cosine, Linear) or Constant."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000)
    """Steps over which the learning rate rises linearly from zero."""
    global_batch_size: int = Field(16, ge=1, le=65536)
    """Sequences per optimizer step over all ranks; the same on any number of GPUs."""
    micro_batch_size: int | None = Field(None, ge=1, le=4096)
    """Sequences per forward pass on one rank. Default: of those that divide the rank's share and keep
    microBatchSize × maxLength within 8192 tokens the fastest that fits the GPU; where it is not known, the largest."""
    optimizer: Optimizer = Optimizer.PAGED_ADAMW_8BIT
    """Paged optimizers let their state move to host memory under pressure; without CUDA they are the plain ones."""
    weight_decay: decimal(0, 1) = "0"  # type: ignore[valid-type]
    """Decoupled weight decay on A and B; never on biases and magnitudes."""
    max_grad_norm: decimal(0, 1000) = "0.3"  # type: ignore[valid-type]
    """Clip the global gradient norm to this; 0 switches clipping off. QLoRA, appendix B.2."""
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.AUTO
    """Recompute activations in the backward pass: Full, None, or Auto: as little as fits the GPU; where that is not
    known, Full; None on a CPU."""
    evaluation: EvaluationSpec = EvaluationSpec()
    seed: int = Field(42, ge=0, le=2147483647)
    """Of adapter initialization, dropout, data order and the held-out rows."""
    rules: ClassVar = (
        Rule(
            "has(self.epochs) != has(self.maxSteps)",
            "set exactly one of epochs and maxSteps",
            "epochs",
            lambda t: (t.epochs is None) != (t.max_steps is None),
        ),
        Rule(
            "!has(self.maxSteps) || self.warmupSteps < self.maxSteps",
            "warmupSteps must be less than maxSteps",
            "warmupSteps",
            lambda t: t.max_steps is None or t.warmup_steps < t.max_steps,
        ),
    )


# --------------------------------------------------------------------------------------------------------- parallelism


class Offload(StrEnum):
    NONE = "None"
    OPTIMIZER = "Optimizer"


class ParallelismSpec(Model):
    """Data parallelism with DeepSpeed ZeRO: every rank holds the whole quantized base. Rajbhandari et al. 2020."""

    workers: int = Field(1, ge=1, le=256)
    """Pods. 'qlora run' uses this machine instead: all its GPUs, or two CPU processes."""
    min_workers: int | None = Field(None, ge=1, le=256)
    """With fewer nodes than workers need, go on with as few pods as this: the same global batch and the same order of
    rows, on fewer ranks. Each next attempt asks for all workers again. Default: wait until there is room."""
    gpus_per_worker: int = Field(1, ge=1, le=16)
    """GPUs, and so ranks, of each pod."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ranks share: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters. LoRA's states are small:
    0 is the fastest and fits nearly always. Even under 3 the whole quantized base must fit each GPU while it loads."""
    offload: Offload = Offload.NONE
    """Optimizer: hold the optimizer state in host memory (AdamW on the CPU replaces the paged optimizers)."""
    rules: ClassVar = (
        Rule(
            "self.offload == 'None' || self.zeroStage >= 1",
            "offload Optimizer needs zeroStage 1, 2 or 3",
            "offload",
            lambda p: p.offload is Offload.NONE or p.zero_stage >= 1,
        ),
        Rule(
            "!has(self.minWorkers) || self.minWorkers <= self.workers",
            "minWorkers must be at most workers",
            "minWorkers",
            lambda p: p.min_workers is None or p.min_workers <= p.workers,
        ),
        Rule(
            "!has(self.minWorkers) || self.zeroStage < 3",
            "a ZeRO-3 checkpoint needs as many ranks as it came from: with minWorkers, zeroStage must be 0, 1 or 2",
            "minWorkers",
            lambda p: p.min_workers is None or p.zero_stage < 3,
        ),
    )


# --------------------------------------------------------------------------------------------------- checkpoint, output


class CheckpointSpec(Model):
    """Resume points: adapter, optimizer, schedule, RNG and data position; never the frozen base."""

    every_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Steps between checkpoints. Default: once an epoch."""
    every_minutes: int = Field(15, ge=1, le=1440)
    """Longest time between checkpoints, so that a lost node costs no more than this."""
    keep: int = Field(3, ge=1, le=100)
    """Newest checkpoints kept; the best by eval loss is kept besides."""


class Merge(StrEnum):
    NONE = "None"
    BFLOAT16 = "BFloat16"


class OutputSpec(Model):
    """Where the verified adapter goes."""

    destination: Destination
    """Folder in object storage (or a local one with 'qlora run'). It must not hold another run's manifest."""
    credentials: Name | None = None
    """Secret in the job's namespace with the destination's credentials as environment variables. The Secrets of a
    job make one environment, in the order model, dataset.train, output: of two with the same key the later counts."""
    merge: Merge = Merge.NONE
    """BFloat16: publish the base with the adapter merged in, besides the adapter."""
    allow_worse_eval: bool = False
    """Publish the best checkpoint even if its loss on the evaluation rows is above the base's. Otherwise the job ends
    without an adapter: the training made the model worse at what it was held against."""


# -------------------------------------------------------------------------------------------------- policy, scheduling


class OnOutOfMemory(StrEnum):
    RECOVER = "Recover"
    FAIL = "Fail"


class PolicySpec(Model):
    """What happens when something happens. May be changed while the job runs."""

    max_restarts: int = Field(3, ge=0, le=50)
    """Attempts after the first that crashes may cost. Preemption and lost nodes do not count; nor does waiting in vain
    for a pod that no node takes. Three stalls in a row without a step gained end the job, whatever is left."""
    on_out_of_memory: OnOutOfMemory = OnOutOfMemory.RECOVER
    """Recover: halve the micro-batch, keep the global batch, resume from the last checkpoint."""
    stall_timeout_seconds: int = Field(1800, ge=30, le=86400)
    """A rank that gives no sign of life for so long is named, and the attempt ended and resumed. Must be longer than
    a forward or backward pass; loading, saving and publishing may take more. Also how long pods wait for each other."""
    shrink_after_seconds: int = Field(120, ge=10, le=86400)
    """With parallelism.minWorkers: how long pods that no node can take are waited for before fewer are tried."""
    active_deadline_seconds: int | None = Field(None, ge=60, le=31536000)
    """Longest time that the job may run, over all attempts: each counts from when all its pods are ready until it ends.
    Preparing, waiting for a queue, for nodes or between attempts, and being suspended do not count. Unlike a
    batch/v1 Job's, the clock goes on where it stood when the job is resumed. Then its pods are stopped, and the job
    fails unless they have published the adapter by the time they are gone; its checkpoints stay."""
    budget_gpu_hours: decimal(0, 1e9, low_included=False) | None = None  # type: ignore[valid-type]
    """GPU-hours over all attempts, waiting not counted. Before more are used the job checkpoints and is suspended; with
    a larger budget it goes on."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=31536000)
    """Delete the finished job after this time. Default: never."""


class Gang(StrEnum):
    AUTO = "Auto"
    NATIVE = "Native"
    KUEUE = "Kueue"
    VOLCANO = "Volcano"
    NONE = "None"


class Toleration(Model):
    """As in a Pod's spec."""

    key: Label | None = None
    """Of the taint. Not set, with operator Exists: every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Exists: any value of the taint will do."""
    value: Label | None = None
    """Of the taint, with operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Of the taint. Not set: any."""
    toleration_seconds: int | None = Field(None, ge=0, le=31536000)
    """With effect NoExecute: how long pods stay on a node that gets the taint. Not set: as long as they run."""


class SchedulingSpec(Model):
    """Which nodes, and in which queue. Not used by 'qlora run'."""

    gang: Gang = Gang.AUTO
    """All pods start or none: by Kubernetes itself (Native), Kueue, Volcano, or not at all (None). Auto takes what
    is there: Kueue where a queue is named, else Native, else Volcano, else None."""
    queue: Name | None = None
    """Queue of Volcano, or LocalQueue of Kueue in the job's namespace. Kueue needs one: it leaves a job that names none
    suspended."""
    priority_class_name: Name | None = None
    """PriorityClass of the trainers' pods; an administrator may allow only some."""
    node_selector: dict[str, Label] = Field({}, max_length=32)
    """Labels that the trainers' nodes must have. By nvidia.com/gpu.product Prepare knows which GPU to plan for."""
    tolerations: list[Toleration] = Field([], max_length=32)
    """Taints that pods put up with, besides that of the GPU resource."""
    rules: ClassVar = (
        Rule(
            "self.gang != 'Kueue' || has(self.queue)",
            "gang Kueue needs queue, the name of a LocalQueue in the job's namespace; or choose Auto, Native, Volcano "
            "or None",
            "queue",
            lambda s: s.gang is not Gang.KUEUE or s.queue is not None,
        ),
    )


# ---------------------------------------------------------------------------------------------------------------- spec

_RESUME = "a resumed run must match its checkpoint; create a new QLoRAJob instead"


class QLoRAJobSpec(Model):
    """What to train and how."""

    model: ModelSpec
    dataset: DatasetSpec
    quantization: QuantizationSpec = QuantizationSpec()
    lora: LoRASpec = LoRASpec()
    training: TrainingSpec
    parallelism: ParallelismSpec = ParallelismSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    output: OutputSpec
    policy: PolicySpec = PolicySpec()
    scheduling: SchedulingSpec = SchedulingSpec()
    suspend: bool = False
    """Checkpoint, free the GPUs and wait; set back to false, the job resumes."""

    immutable: ClassVar = dict.fromkeys(
        ("model", "dataset", "quantization", "lora", "training", "parallelism", "output"), _RESUME
    )
    rules: ClassVar = (
        Rule(
            "self.training.globalBatchSize % (self.parallelism.workers * self.parallelism.gpusPerWorker) == 0",
            "globalBatchSize must be a multiple of parallelism.workers × parallelism.gpusPerWorker",
            "training.globalBatchSize",
            lambda s: s.training.global_batch_size % (s.parallelism.workers * s.parallelism.gpus_per_worker) == 0,
        ),
        Rule(
            "!has(self.training.microBatchSize) || self.training.globalBatchSize %"
            " (self.training.microBatchSize * self.parallelism.workers * self.parallelism.gpusPerWorker) == 0",
            "globalBatchSize must be a multiple of microBatchSize × parallelism.workers × parallelism.gpusPerWorker",
            "training.microBatchSize",
            lambda s: (
                s.training.micro_batch_size is None
                or s.training.global_batch_size
                % (s.training.micro_batch_size * s.parallelism.workers * s.parallelism.gpus_per_worker)
                == 0
            ),
        ),
        Rule(
            "!has(self.training.evaluation.patience) || has(self.dataset.eval)",
            "training.evaluation.patience needs evaluation rows: set dataset.eval",
            "training.evaluation.patience",
            lambda s: s.training.evaluation.patience is None or s.dataset.eval is not None,
        ),
        Rule(
            "!has(self.training.evaluation.everySteps) || has(self.dataset.eval)",
            "training.evaluation.everySteps needs evaluation rows: set dataset.eval",
            "training.evaluation.everySteps",
            lambda s: s.training.evaluation.every_steps is None or s.dataset.eval is not None,
        ),
        Rule(
            "self.quantization.type != 'INT8' || self.parallelism.zeroStage < 3",
            "quantization.type INT8 cannot be partitioned: parallelism.zeroStage must be 0, 1 or 2",
            "parallelism.zeroStage",
            lambda s: s.quantization.type is not QuantizationType.INT8 or s.parallelism.zero_stage < 3,
        ),
        Rule(
            "self.quantization.type != 'INT8' || !self.lora.dora",
            "lora.dora needs the norms of the base's weights, which quantization.type INT8 does not give: "
            "use NF4, FP4 or None",
            "lora.dora",
            lambda s: s.quantization.type is not QuantizationType.INT8 or not s.lora.dora,
        ),
    )
