"""The contract between whoever starts a trainer (the operator, ``qlora run``) and the trainer.

In: one resolved, immutable :class:`TrainerConfig`, and in a pod of several workers the pod's index in
``JOB_COMPLETION_INDEX``. Out: an exit code, and a :class:`TerminationMessage` in the file that the config names. While
it runs: ``GET /progress`` (:class:`qlora_api.status.Progress` and more), and of a rank ``/metrics``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from qlora_api.base import Model
from qlora_api.batch import BatchSplit
from qlora_api.spec import ComputeType, QLoRAJobSpec
from qlora_api.status import Adapter, Count, Memory, PrepareResult, Progress, Reason, TaskResult, TrackedRun

TERMINATION_MESSAGE_BYTES = 4096
"""Kubernetes keeps no more of /dev/termination-log."""


class ExitCode(IntEnum):
    """Exit code of a trainer. Values stay clear of shells' and signals' own (1, 2, 126 and above)."""

    DONE = 0
    CRASHED = 1
    """Any exception that has no code of its own."""
    USER_ERROR = 40
    OUT_OF_DEVICE_MEMORY = 41
    OUT_OF_HOST_MEMORY = 42
    PREEMPTED = 43
    STALLED = 44
    NON_FINITE_LOSS = 45
    CHECKPOINT_UNREADABLE = 46
    STORAGE_FAILED = 47
    ADAPTER_REJECTED = 48
    PEER_LOST = 49
    """A rank of another pod went away; that pod, or its node, knows why."""


REASONS: dict[int, Reason] = {
    ExitCode.DONE: Reason.COMPLETED,
    ExitCode.CRASHED: Reason.CRASHED,
    ExitCode.USER_ERROR: Reason.USER_ERROR,
    ExitCode.OUT_OF_DEVICE_MEMORY: Reason.OUT_OF_DEVICE_MEMORY,
    ExitCode.OUT_OF_HOST_MEMORY: Reason.OUT_OF_HOST_MEMORY,
    ExitCode.PREEMPTED: Reason.PREEMPTED,
    ExitCode.STALLED: Reason.STALLED,
    ExitCode.NON_FINITE_LOSS: Reason.NON_FINITE_LOSS,
    ExitCode.CHECKPOINT_UNREADABLE: Reason.CHECKPOINT_UNREADABLE,
    ExitCode.STORAGE_FAILED: Reason.STORAGE_FAILED,
    ExitCode.ADAPTER_REJECTED: Reason.ADAPTER_REJECTED,
    ExitCode.PEER_LOST: Reason.PEER_LOST,
    143: Reason.PREEMPTED,  # SIGTERM before the trainer could catch it: nothing was done that could be lost
    137: Reason.OUT_OF_HOST_MEMORY,  # SIGKILL, of which nothing more is known; in a pod the kubelet knows more
}


def reason_of(exit_code: int) -> Reason:
    """Return why an attempt ended, from its exit code alone; an unknown code is a crash."""
    return REASONS.get(exit_code if exit_code >= 0 else 128 - exit_code, Reason.CRASHED)


class JobRef(Model):
    name: str
    namespace: str = "default"
    uid: str
    """Names the run: checkpoints and the published manifest carry it."""
    cluster: str = ""
    """Identity of the cluster that the job is an object of; empty: of none, or it is not known."""


class TrainerConfig(Model):
    """All that a trainer is told, resolved and final. An attempt never changes."""

    job: JobRef
    spec: QLoRAJobSpec
    attempt: int = Field(1, ge=1)
    restarts: int = Field(0, ge=0)
    batch: BatchSplit
    device: Literal["CUDA", "CPU"]
    ranks_per_worker: int = Field(ge=1)
    workers: int = Field(1, ge=1)
    """Pods of this attempt. Worker i, numbered by the environment's ``JOB_COMPLETION_INDEX``, holds the ranks from
    i × ranks_per_worker on."""
    rendezvous: str | None = None
    """``host:port`` of worker 0, where all workers meet. Not needed for one worker."""
    key_file: str | None = None
    """File with the run's key, at least 32 bytes that nobody else knows. Workers prove with it that they belong to the
    attempt; checkpoints and manifest are signed with it. None: nothing is signed, and there is one worker at most."""
    accepts_unsigned: bool = False
    """The run began before runs had keys: checkpoints and a manifest without a signature are its own."""
    gradient_checkpointing: bool
    pause_at_step: int | None = Field(None, ge=1)
    """Step after which the attempt evaluates where that is due, saves a checkpoint and ends as if told to stop.
    None, or the last step: it trains to the end."""
    checkpoint_uri: str
    """Folder, local or in object storage, for this run's checkpoints."""
    cache_dir: str
    """Local folder for fetched models, fetched rows and tokenized rows; content-addressed, shared by runs."""
    shared_cache_uri: str | None = None
    """Folder in object storage or on a claim where Prepare leaves what it made, content-addressed, for the trainers of
    this and of later jobs. None: ``cache_dir`` is all there is."""
    gpu: str | None = None
    """GPU of each rank, by its name in ``qlora_memory.GPUS``: Prepare chooses what fits it. None: not known,
    or the CPU; then nothing is chosen by memory."""
    memory_correction: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor on predicted bytes before they are compared with the GPU's memory: measured over predicted, as learned
    from jobs that this cluster has finished. 1: nothing is learned yet."""
    termination_message_path: str
    metrics_port: int = Field(9400, ge=0, le=65535)
    """Rank r of a pod serves /metrics and /progress on this port + r; 0: any free port (written to ``ports_dir``)."""
    metrics_host: str = ""
    """Empty: all addresses, of IPv4 and IPv6."""
    ports_dir: str | None = None
    """Folder in which each rank writes its port to ``rank-N.port``, for the process that started it with port 0."""


class TerminationMessage(Model):
    """The termination message of an attempt, or of Prepare, as JSON, at most 4 KiB."""

    model_config = ConfigDict(extra="ignore")  # a trainer of another version may say more

    exit_code: int
    reason: Reason
    message: str = ""
    """One paragraph: field, value, what is allowed; or what happened and where."""
    rank: int | None = None
    progress: Progress | None = None
    first_step: Count | None = None
    """Step at which the attempt started: 0, or the step of a checkpoint."""
    memory: Memory | None = None
    tokens: Count | None = None
    """Real tokens that the adapter was trained on, over all ranks and attempts; not set where it has none yet."""
    adapter: Adapter | None = None
    compute_type: ComputeType | None = None
    """Compute type of the base in that run."""
    prepared: PrepareResult | None = None
    """Result of Prepare; None from a process that trains."""
    tasks: list[TaskResult] = Field([], max_length=8)
    """Results of spec.evaluate."""
    tracking: list[TrackedRun] = Field([], max_length=3)
    """The run in each tool of spec.tracking; of worker 0."""

    def to_bytes(self) -> bytes:
        """JSON within the limit; the message is what gives way."""
        message = self.message
        while True:
            text = (
                self.model_copy(update={"message": message}).model_dump_json(by_alias=True, exclude_none=True).encode()
            )
            if len(text) <= TERMINATION_MESSAGE_BYTES or not message:
                return text
            message = message[: len(message) * 9 // 10 - 2] + " …" if len(message) > 4 else ""


class RankActivity(Model):
    """Current or last activity of one rank."""

    rank: int
    node: str
    section: str
    """Load, Data, Forward, Backward, Collective, Optimizer, Evaluate, Checkpoint or Publish."""
    seconds: float
    """In this section up to now; of the slowest rank, of the last step by itself, waits for others left out."""
    median_seconds: float | None = None
    """Median over all ranks, to compare with the slowest."""


class SectionProgress(Model):
    """Progress of a rank within its section."""

    unit: str
    """Unit that is counted: ``weights``, ``micro-batches``."""
    done: int
    total: int
    seconds: float
    """Since the first of them."""


Section = Literal["Prepare", "Load", "Data", "Train", "Evaluate", "Checkpoint", "Publish", "Done"]
TRAINING = "training"
_DOING: dict[Section, str] = {
    "Prepare": "checking model and rows",
    "Load": "loading the model",
    "Data": TRAINING,
    "Train": TRAINING,
    "Evaluate": "evaluating",
    "Checkpoint": "saving a checkpoint",
    "Publish": "checking and publishing the adapter",
    "Done": "done",
}


class ProgressReport(Progress):
    """The answer of ``GET /progress`` on rank 0, or of Prepare."""

    model_config = ConfigDict(extra="ignore")

    job: str
    attempt: int
    section: Section
    """Part of the work that the rank is in; ``Prepare``, with attempt 0, in the report of Prepare itself."""
    stage: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Part of a Prepare or Load that is done now, such as ``quantizing``; None in other sections."""
    stage_seconds: float = 0
    """Time in the stage, or in a section without stages, so far."""
    section_progress: SectionProgress | None = None
    """Progress within a section whose length is known: Load or Evaluate."""
    section_seconds: dict[str, float] = {}
    """Time of rank 0 in this attempt by section, the one at work up to now."""
    expected_seconds: int | None = None
    """Time for all that this attempt has to do, evaluations included, by a trial step before the first one."""
    memory: Memory
    compute_type: ComputeType | None = None
    """Compute type of the base: that of the job, or the one that Auto resolves to on this run's device."""
    warnings: list[Annotated[str, StringConstraints(max_length=512)]] = Field([], max_length=8)
    """Warnings for the user about this attempt, each once."""
    tracking: list[TrackedRun] = Field([], max_length=3)
    """The run in each tool of spec.tracking."""
    first_step: int = 0
    elapsed_seconds: float = 0
    tokens: int = 0
    """Real tokens trained on in this attempt, over all ranks."""
    longest_step_seconds: float = 0
    """Longest step of this attempt so far. Together with the longest save it bounds the time between SIGTERM and
    exit."""
    longest_save_seconds: float = 0
    slowest: RankActivity | None = None
    """The rank that took longest by itself in the last step, and where. Shown, never ended for it."""
    waiting_for: RankActivity | None = None
    """The rank of rank 0's pod that the others wait for at this moment."""

    @property
    def doing(self) -> str:
        """Return the stage, or the section in words."""
        return self.stage or _DOING[self.section]


class PrepareReceipt(Model):
    """Findings of Prepare about the rows. Content-addressed by ``data_hash``."""

    model_config = ConfigDict(hide_input_in_errors=True)  # samples are text of rows

    data_hash: str
    train_rows: int
    train_tokens: int
    train_target_tokens: int
    train_sequences: int
    """Packs, or rows without packing: what globalBatchSize counts."""
    eval_rows: int
    eval_tokens: int
    truncated: int
    """Rows that lost their tail, of training and evaluation together; so for dropped and fully_masked."""
    dropped: int
    fully_masked: int
    """Rows left out because no token counts (truncation cut it, or the row is empty)."""
    rows: int = 0
    """Rows as they were read; the other figures count the examples that they gave."""
    rows_with_tools: int = 0
    """Rows whose tools the chat template writes; the tools of others are counted as left out."""
    split_rows: int = 0
    """Rows that gave several examples, since the chat template rewrites earlier turns."""
    left_out: int = 0
    """Rows of which the chat template or the tokenizer leaves something out, or in which the assistant says nothing."""
    empty_turns: int = 0
    """Messages of the assistant of which nothing is written. They are not learned."""
    notes: list[str] = []
    """Notes for the user on how the rows were rendered."""
    conversations: bool = False
    """PromptCompletion: the rows are conversations, and so a prompt is a turn of the user."""
    duplicates: int
    """Training rows that repeat an earlier one token by token. They are kept."""
    eval_in_train: int
    """Evaluation rows that are training rows too: for these the eval loss measures memory."""
    eval_prompts_in_train: int = 0
    """Evaluation rows whose prompt is that of a training row too, with the same answer or another."""
    longest: int
    """Tokens of the longest row, before it was cut or dropped."""
    lengths: dict[int, int] = {}
    """Training rows by their tokens: the key is the power of two that they do not exceed."""
    packing_efficiency: float
    """Real tokens / slots of maxLength."""
    samples: list[str]
    """Rendered rows with the tokens that count between ⟦ and ⟧: in the cache alone, not in Prepare's output."""
