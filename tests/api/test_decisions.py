"""The batch equation, what follows an attempt, and the contract's edges."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from qlora_api import QLoRAJob
from qlora_api.batch import BatchSplit, halve_micro_batch, split_batch
from qlora_api.contract import REASONS, TERMINATION_MESSAGE_BYTES, ExitCode, TerminationMessage, reason_of
from qlora_api.errors import FieldError
from qlora_api.lifecycle import FinishJob, Retry, after_attempt, restarts
from qlora_api.spec import OnOutOfMemory, PolicySpec
from qlora_api.status import Attempt, Reason

from .manifests import manifest


def spec(**changes):
    return QLoRAJob.from_manifest(manifest(**changes)).spec


@pytest.mark.parametrize(
    ("changes", "ranks", "expected"),
    [
        pytest.param(
            {"training__globalBatchSize": 16, "dataset__maxLength": 2048}, 2, (4, 2), id="8192-tokens-at-once"
        ),
        pytest.param({"training__globalBatchSize": 16, "dataset__maxLength": 512}, 2, (8, 1), id="all-at-once"),
        pytest.param({"training__globalBatchSize": 6, "dataset__maxLength": 4096}, 2, (1, 3), id="largest-divisor"),
        pytest.param(
            {"training__globalBatchSize": 4, "dataset__maxLength": 32768}, 4, (1, 1), id="never-less-than-one"
        ),
        pytest.param({"training__globalBatchSize": 16, "training__microBatchSize": 2}, 4, (2, 2), id="as-asked"),
    ],
)
def test_the_global_batch_is_cut_for_any_number_of_ranks(changes, ranks, expected):
    split = split_batch(spec(**changes), ranks)
    assert (split.micro_batch_size, split.gradient_accumulation_steps) == expected
    assert split.global_batch_size == changes["training__globalBatchSize"]


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        pytest.param(
            {"training__globalBatchSize": 16},
            3,
            "spec.training.globalBatchSize: 16 must be a multiple of the 3 ranks; the next ones are 15 and 18",
            id="ranks-do-not-divide",
        ),
        pytest.param(
            {"training__globalBatchSize": 16, "training__microBatchSize": 8},
            4,
            "spec.training.microBatchSize: 8 must divide each rank's 4 sequences of the global batch of 16: 1, 2, 4",
            id="micro-batch-does-not-divide",
        ),
    ],
)
def test_a_batch_that_cannot_be_cut_is_answered_with_sizes_that_can(changes, ranks, message):
    with pytest.raises(FieldError) as caught:
        split_batch(spec(**changes), ranks)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("micro", "accumulation", "expected"), [(4, 2, (2, 4)), (6, 1, (3, 2)), (3, 2, (1, 6)), (1, 8, None)]
)
def test_half_a_micro_batch_keeps_the_global_batch(micro, accumulation, expected):
    smaller = halve_micro_batch(
        BatchSplit(world_size=2, micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    )
    assert (smaller and (smaller.micro_batch_size, smaller.gradient_accumulation_steps)) == expected


def attempt(reason, number=1, micro=4):
    return Attempt(
        number=number,
        world_size=2,
        micro_batch_size=micro,
        gradient_accumulation_steps=2,
        start_time=datetime(2026, 1, 1, tzinfo=UTC),
        reason=reason,
        message="why",
    )


@pytest.mark.parametrize(
    ("reasons", "policy", "expected"),
    [
        pytest.param([Reason.COMPLETED], {}, "finish-succeeded", id="done"),
        pytest.param([Reason.USER_ERROR], {}, "finish-failed", id="a-user-error-is-never-retried"),
        pytest.param([Reason.NON_FINITE_LOSS], {}, "finish-failed", id="the-same-data-gives-the-same-loss"),
        pytest.param([Reason.ADAPTER_REJECTED], {}, "finish-failed", id="the-same-training-gives-the-same-adapter"),
        pytest.param([Reason.CRASHED], {}, "retry-counted", id="a-crash-counts"),
        pytest.param([Reason.CRASHED] * 3, {}, "retry-counted", id="the-last-restart"),
        pytest.param([Reason.CRASHED] * 4, {}, "finish-failed", id="no-restart-left"),
        pytest.param([Reason.CRASHED], {"max_restarts": 0}, "finish-failed", id="no-restart-allowed"),
        pytest.param([Reason.PREEMPTED] * 9, {}, "retry-free", id="preemption-is-free"),
        pytest.param([Reason.CRASHED] * 3 + [Reason.NODE_LOST], {}, "retry-free", id="a-lost-node-is-free"),
        pytest.param([Reason.CRASHED] * 3 + [Reason.PEER_LOST], {}, "retry-free", id="a-pod-that-vanished-is-free"),
        pytest.param([Reason.OUT_OF_DEVICE_MEMORY], {}, "retry-smaller", id="out-of-memory-halves-the-micro-batch"),
        pytest.param(
            [Reason.OUT_OF_DEVICE_MEMORY],
            {"on_out_of_memory": OnOutOfMemory.FAIL},
            "finish-failed",
            id="unless-it-must-not",
        ),
    ],
)
def test_what_follows_an_attempt(reasons, policy, expected):
    attempts = [attempt(r, n + 1) for n, r in enumerate(reasons)]
    match after_attempt(PolicySpec(**policy), attempts):
        case FinishJob(succeeded=succeeded):
            seen = f"finish-{'succeeded' if succeeded else 'failed'}"
        case Retry(batch=batch, counted=counted):
            seen = "retry-smaller" if batch.micro_batch_size == 2 else f"retry-{'counted' if counted else 'free'}"
    assert seen == expected


@pytest.mark.parametrize(
    ("ended", "after"),
    [
        pytest.param([("Stalled", 0, 5), ("Stalled", 5, 5), ("Stalled", 5, 5)], "retry", id="two-in-a-row"),
        pytest.param([("Stalled", 0, None)] * 3, "Stalled", id="three-before-the-first-step"),
        pytest.param([("Stalled", 0, 5), *[("Stalled", 5, 5)] * 3], "Stalled", id="three-restarts-without-a-step"),
        pytest.param([("Stalled", 0, 5), *[("Stalled", 2, 5)] * 3], "Stalled", id="the-same-steps-again-are-no-gain"),
        pytest.param([("Stalled", 0, 5), ("Stalled", 5, 6), *[("Stalled", 6, 6)] * 2], "retry", id="a-step-was-gained"),
        pytest.param([("PeerLost", 0, None)] * 3, "PeerLost", id="free-of-charge-yet-not-for-ever"),
        pytest.param(
            [("Stalled", 0, None), ("PeerLost", 0, None), ("Stalled", 0, None)], "Stalled", id="of-either-kind"
        ),
        pytest.param(
            [*[("Stalled", 0, None)] * 2, ("Preempted", 0, None), ("Stalled", 0, None)],
            "Stalled",
            id="a-preemption-between-changes-nothing",
        ),
        pytest.param(
            [*[("Stalled", 0, None)] * 2, ("Preempted", 0, 3), ("Stalled", 3, 3)], "retry", id="unless-it-came-further"
        ),
        pytest.param(
            [*[("Stalled", 0, None)] * 2, ("OutOfDeviceMemory", 0, None), ("Stalled", 0, None)],
            "retry",
            id="a-smaller-batch-is-another-try",
        ),
        pytest.param([("Unschedulable", 0, None)] * 9, "retry", id="a-peer-that-found-no-node-is-no-stall"),
        pytest.param([("Crashed", 0, None)] * 4, "retry", id="crashes-are-counted-by-max-restarts"),
    ],
)
def test_stalls_without_progress_end_a_job_whatever_restarts_are_left(ended, after):
    attempts = [
        attempt(Reason(reason), number).model_copy(update={"first_step": first, "last_step": last})
        for number, (reason, first, last) in enumerate(ended, 1)
    ]
    decision = after_attempt(PolicySpec(max_restarts=50), attempts)
    assert (decision.reason.value if isinstance(decision, FinishJob) else "retry") == after
    if isinstance(decision, FinishJob):
        assert decision.message == "why (3 attempts in a row ended so, without a step gained)"


def test_the_last_stalls_node_is_named_where_its_own_word_does_not():
    last = attempt(Reason.STALLED, 3).model_copy(update={"node": "node-b"})
    ended = [attempt(Reason.STALLED, 1), attempt(Reason.STALLED, 2)]
    assert ", the last on node-b, " in after_attempt(PolicySpec(), [*ended, last]).message
    said = last.model_copy(update={"message": "rank 1 on node-b is stuck in Backward"})
    assert "the last on" not in after_attempt(PolicySpec(), [*ended, said]).message


def test_out_of_memory_with_one_sequence_at_a_time_recomputes_activations_and_then_ends_the_job():
    first = attempt(Reason.OUT_OF_DEVICE_MEMORY, micro=1)
    decision = after_attempt(PolicySpec(), [first])
    assert isinstance(decision, Retry)
    assert decision.gradient_checkpointing
    second = first.model_copy(update={"gradient_checkpointing": True})
    end = after_attempt(PolicySpec(), [first, second])
    assert isinstance(end, FinishJob)
    assert "a lower spec.dataset.maxLength or spec.lora.rank" in end.message
    host = second.model_copy(update={"reason": Reason.OUT_OF_HOST_MEMORY})
    assert "trainer.memory" in after_attempt(PolicySpec(), [first, host]).message


def test_host_memory_is_made_room_for_like_the_devices():
    decision = after_attempt(PolicySpec(), [attempt(Reason.OUT_OF_HOST_MEMORY, micro=2)])
    assert isinstance(decision, Retry)
    assert decision.batch.micro_batch_size == 1


def test_preemption_before_the_first_step_waits_longer_each_time_and_progress_ends_the_wait():
    idle = [attempt(Reason.PREEMPTED)] * 3
    waits = [after_attempt(PolicySpec(), idle[:n]).wait_seconds for n in (1, 2, 3)]
    assert waits == sorted(set(waits))
    moved = attempt(Reason.PREEMPTED).model_copy(update={"first_step": 0, "last_step": 5})
    assert after_attempt(PolicySpec(), [*idle, moved]).wait_seconds == 0


def test_only_what_the_job_did_counts_as_a_restart():
    assert restarts([attempt(r) for r in (Reason.CRASHED, Reason.PREEMPTED, Reason.STALLED, None)]) == 2


def test_each_restart_waits_longer_than_the_one_before():
    waits = [after_attempt(PolicySpec(max_restarts=9), [attempt(Reason.CRASHED)] * n).wait_seconds for n in range(1, 8)]
    assert waits == sorted(waits)
    assert waits[0] < waits[-1]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (ExitCode.DONE, Reason.COMPLETED),
        (ExitCode.PREEMPTED, Reason.PREEMPTED),
        (1, Reason.CRASHED),
        (137, Reason.OUT_OF_HOST_MEMORY),
        (-9, Reason.OUT_OF_HOST_MEMORY),
        (143, Reason.PREEMPTED),
        (ExitCode.PEER_LOST, Reason.PEER_LOST),
        (-11, Reason.CRASHED),
    ],
)
def test_an_exit_code_alone_gives_a_reason(code, reason):
    assert reason_of(code) is reason


@pytest.mark.parametrize("text", ["x" * 9000, '\u00e4"\n' * 4000, "short"], ids=["long", "escapes", "short"])
def test_the_last_word_fits_where_kubernetes_keeps_it(text):
    data = TerminationMessage(exit_code=1, reason=Reason.CRASHED, message=text).to_bytes()
    assert len(data) <= TERMINATION_MESSAGE_BYTES
    assert TerminationMessage.model_validate_json(data).message.startswith(text[:5])


def test_every_exit_code_has_a_reason():
    assert {code.name for code in ExitCode if code not in REASONS} == set()
