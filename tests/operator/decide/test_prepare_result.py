"""Results of Prepare in status and in words: hours, money, and what the plan was corrected by."""

from __future__ import annotations

import pytest

from operator_builders import PREPARING, child, decide, job, observed, pod
from qlora_api.contract import ExitCode, TerminationMessage
from qlora_api.errors import ManifestError, validate
from qlora_api.status import ConditionType, PrepareResult, QLoRAJobStatus, Reason
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.prepare_result import GPU_NOT_KNOWN
from qlora_operator.state.observed import JobState

ON_H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def found(hours: str | None):
    """Return what is observed once Prepare has ended."""
    result = PrepareResult.model_validate(
        {
            "modelRevision": "0123456789abcdef",
            "dataHash": "d",
            "trainRows": 7,
            "trainTokens": 70,
            "trainSequences": 7,
            "batch": {"worldSize": 1, "microBatchSize": 4, "gradientAccumulationSteps": 4},
            "gradientCheckpointing": True,
            "expectedGpuHours": hours,
        }
    )
    word = TerminationMessage(exit_code=ExitCode.DONE, reason=Reason.COMPLETED, prepared=result).to_bytes().decode()
    return observed(child(0, JobState.COMPLETE), pod(0, code=0, message=word))


def priced(**prices: float) -> OperatorConfig:
    names = {name.replace("_", "-"): price for name, price in prices.items()}
    return OperatorConfig.model_validate({"trainer": {"image": "trainer:1"}, "pricePerGpuHour": names})


def on(**trainer: str) -> OperatorConfig:
    return OperatorConfig.model_validate({"trainer": {"image": "trainer:1", **trainer}})


def said(status: QLoRAJobStatus) -> str:
    return next(c.message for c in status.conditions if c.type is ConditionType.PREPARED)


ROWS = "7 rows, 70 tokens, model revision 0123456789ab"


@pytest.mark.parametrize(
    ("hours", "config", "spec", "cost", "words"),
    [
        pytest.param("12.5", PREPARING, {}, None, ", about 12.5 GPU-hours", id="hours-without-a-price"),
        pytest.param(
            "12.5", priced(default=2), {}, "25.00", ", about 12.5 GPU-hours for 25.00", id="one-price-for-all"
        ),
        pytest.param(
            "2",
            priced(default=2, h100_80gb=2.25),
            {"scheduling": {"nodeSelector": ON_H100}},
            "4.50",
            ", about 2 GPU-hours for 4.50",
            id="the-price-of-the-nodes-gpu",
        ),
        pytest.param("2", priced(h100_80gb=3), {}, None, ", about 2 GPU-hours", id="no-price-for-this-one"),
        pytest.param(
            None, priced(default=2), {}, None, f", {GPU_NOT_KNOWN}", id="hours-that-are-not-known-cost-nothing-known"
        ),
        pytest.param(
            None,
            PREPARING,
            {},
            None,
            ", GPU not known: memory was not planned; set gpu in the job's profile or trainer.gpu in the chart, or "
            "nvidia.com/gpu.product in "
            "spec.scheduling.nodeSelector",
            id="nobody-says-which-gpu",
        ),
        pytest.param(None, on(gpu="l4-24gb"), {}, None, "", id="the-operator-says-which-gpu"),
        pytest.param(None, PREPARING, {"scheduling": {"nodeSelector": ON_H100}}, None, "", id="the-job-says-which-gpu"),
        pytest.param(None, on(device="CPU"), {}, None, "", id="no-gpu"),
        pytest.param(
            "12.5",
            PREPARING,
            {"policy": {"budgetGpuHours": "10"}},
            None,
            ", about 12.5 GPU-hours, more than spec.policy.budgetGpuHours (10): the job will be suspended before it "
            "has finished",
            id="more-than-its-budget",
        ),
        pytest.param(
            "12.5", PREPARING, {"policy": {"budgetGpuHours": "13"}}, None, ", about 12.5 GPU-hours", id="within-budget"
        ),
    ],
)
def test_status_says_before_a_gpu_is_held_what_the_job_should_take_and_cost(hours, config, spec, cost, words):
    status = decide(job(QLoRAJobStatus(), **spec), found(hours), config).status
    assert status.prepared.expected_gpu_hours == hours
    assert status.expected_cost == cost
    assert said(status) == ROWS + words


def test_a_price_of_a_gpu_that_nobody_knows_is_refused_with_those_that_are():
    with pytest.raises(ManifestError) as caught:
        validate(OperatorConfig, {"trainer": {"image": "t"}, "pricePerGpuHour": {"H100": 2}})
    assert "pricePerGpuHour: " in str(caught.value)
    assert '"H100" is not known; use default or one of' in str(caught.value)
    assert "h100-80gb" in str(caught.value)


def test_status_says_by_what_the_plan_was_corrected():
    started = decide(job(), observed(memory_correction=1.025), PREPARING).status
    assert started.memory_correction == "1.0250"
    later = decide(job(started), found(None), PREPARING).status  # by now something else is known
    assert later.memory_correction == "1.0250"
    assert decide(job(), observed(), PREPARING).status.memory_correction is None
