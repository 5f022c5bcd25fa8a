"""Corrections of predicted memory: from which jobs, how fast, within which bounds, and with how few writes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from operator_builders import CONFIG, child, decide, job, observed
from qlora_api.status import QLoRAJobStatus
from qlora_operator.act.correction_store import Corrections
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.memory_correction import LEAST, MOST, CorrectionKey, Learned, learn, ratio_of, read
from qlora_operator.kube.client import ApiError
from qlora_operator.manifests.render import prepare
from qlora_operator.state.observed import JobState

HERE = CorrectionKey("h100-80gb", "NF4")
LEARNING = OperatorConfig.model_validate(
    {"memoryConfigMap": "system/qlora-memory", "trainer": {"image": "trainer:1", "gpu": "h100-80gb"}}
)


def ended(measured: int | None = 103, predicted: int | None = 100, state: str = "Succeeded") -> QLoRAJobStatus:
    peaks = {"measured": measured, "predicted": predicted}
    memory = {side: {"peak": size} for side, size in peaks.items() if size is not None}
    return QLoRAJobStatus.model_validate({"state": state, "memory": memory})


@pytest.mark.parametrize(
    ("status", "ratio"),
    [
        pytest.param(ended(), 1.03, id="measured-over-predicted"),
        pytest.param(ended(state="Failed"), None, id="a-job-that-failed-may-have-stopped-before-its-peak"),
        pytest.param(ended(predicted=None), None, id="nothing-predicted"),
        pytest.param(ended(measured=None), None, id="nothing-measured"),
        pytest.param(ended(measured=0), None, id="no-peak-is-no-measure"),
        pytest.param(QLoRAJobStatus(state="Succeeded"), None, id="no-memory-at-all"),
    ],
)
def test_only_a_job_that_succeeded_with_both_figures_says_something(status, ratio):
    assert ratio_of(status) == ratio


@pytest.mark.parametrize(
    ("ratios", "correction"),
    [
        pytest.param([1.05], 1.01, id="one-job-moves-it-by-a-fifth"),
        pytest.param([1.05] * 40, 1.05, id="many-take-it-there"),
        pytest.param([1.05] * 40 + [1.0] * 40, 1.0, id="and-back"),
        pytest.param([9.0] * 90, MOST, id="never-above-its-bound"),
        pytest.param([0.1] * 90, LEAST, id="never-below-its-bound"),
        pytest.param([9.0], 1.03, id="one-that-is-far-off-weighs-no-more-than-the-bound"),
    ],
)
def test_the_factor_follows_what_jobs_say(ratios, correction):
    learned = Learned()
    for ratio in ratios:
        learned = learn(learned, ratio)
    assert learned.correction == pytest.approx(correction, abs=1e-4)
    assert learned.jobs == len(ratios)


def test_what_a_person_wrote_is_bounded_and_what_nobody_can_read_counts_for_nothing():
    found = read({"h100-80gb.NF4": '{"correction": 7, "jobs": 1}', "l4-24gb.NF4": "much", "note": '{"jobs": -1}'})
    assert found == {HERE: Learned(correction=MOST, jobs=1)}


class FakeApi:
    """One ConfigMap."""

    def __init__(self, data: dict[str, str] | None = None, error: int | None = None) -> None:
        self.data, self.error, self.writes = data or {}, error, 0

    async def get(self, path: str) -> dict[str, Any]:
        return self._answer(path)

    async def patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._answer(path)
        self.data |= body["data"]
        self.writes += 1
        return answer

    def _answer(self, path: str) -> dict[str, Any]:
        assert path == "/api/v1/namespaces/system/configmaps/qlora-memory"
        if self.error:
            raise ApiError(self.error, "", "no")
        return {"data": self.data} if self.data else {}


def held(api: FakeApi, config: OperatorConfig = LEARNING) -> tuple[Corrections, list[dict]]:
    shown: list[dict] = []
    return Corrections(api, config, lambda factors: shown.append(dict(factors))), shown


def take(corrections: Corrections, *ratios: float, a_job=None) -> float:
    async def each() -> None:
        for ratio in ratios:
            await corrections.take((a_job or job()).spec, ended(round(ratio * 10_000), 10_000))

    asyncio.run(each())
    return corrections.of(job().spec)


def test_what_was_learned_is_written_shown_and_there_after_a_restart():
    api = FakeApi()
    before, shown = held(api)
    assert take(before, 1.1) == pytest.approx(1.02)
    assert json.loads(api.data["h100-80gb.NF4"]) == {"correction": 1.02, "jobs": 1}
    assert shown[-1] == {("h100-80gb", "NF4"): pytest.approx(1.02)}
    after, _ = held(api)
    assert after.of(job().spec) == 1.0
    asyncio.run(after.refresh())
    assert after.of(job().spec) == 1.02
    assert api.writes == 1


def test_small_changes_are_gathered_before_they_are_written():
    api = FakeApi()
    corrections, _ = held(api)
    take(corrections, *[1.02] * 60)
    assert 1 <= api.writes <= 4
    take(corrections, *[1.02] * 1000)
    assert api.writes <= 4


def test_each_gpu_and_quantization_learns_by_itself():
    corrections, _ = held(FakeApi())
    take(corrections, 1.1, a_job=job(quantization={"type": "INT8"}))
    take(corrections, 1.1, a_job=job(scheduling={"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"}}))
    assert corrections.of(job().spec) == 1.0
    assert corrections.of(job(quantization={"type": "INT8"}).spec) == pytest.approx(1.02)


@pytest.mark.parametrize("config", [CONFIG, LEARNING.model_copy(update={"memory_config_map": ""})], ids=["gpu", "map"])
def test_without_a_known_gpu_or_a_place_to_keep_it_nothing_is_learned(config):
    api = FakeApi(error=500)
    corrections, shown = held(api, config)
    assert take(corrections, 1.1) == 1.0
    assert shown == []


def test_a_person_may_set_or_clear_a_factor():
    api = FakeApi({"h100-80gb.NF4": '{"correction": 1.1, "jobs": 9}'})
    corrections, _ = held(api)
    asyncio.run(corrections.refresh())
    assert corrections.of(job().spec) == 1.1
    api.data = {"h100-80gb.NF4": '{"correction": 1.0}'}
    asyncio.run(corrections.refresh())
    assert corrections.of(job().spec) == 1.0
    api.data = {}
    asyncio.run(corrections.refresh())
    assert take(corrections, 1.1) == pytest.approx(1.02)


@pytest.mark.parametrize("error", [403, 404, 500])
def test_a_config_map_out_of_reach_stops_nothing_and_is_written_later(error):
    api = FakeApi(error=error)
    corrections, _ = held(api)
    asyncio.run(corrections.refresh())
    assert take(corrections, 1.1) == pytest.approx(1.02)
    api.error = None
    take(corrections, 1.0)
    assert json.loads(api.data["h100-80gb.NF4"])["jobs"] == 2


def test_prepare_and_trainers_are_told():
    told = '"memoryCorrection":1.02'
    planned = decide(job(), observed(memory_correction=1.02))
    assert told in planned.create[-1]["spec"]["template"]["metadata"]["annotations"]["qlora.dev/config"]
    alone = prepare(job(), CONFIG, 1.02)
    assert told in alone["spec"]["template"]["metadata"]["annotations"]["qlora.dev/config"]
    again = decide(job(), observed(child(0, JobState.COMPLETE), memory_correction=1.02))
    assert told in again.create[-1]["spec"]["template"]["metadata"]["annotations"]["qlora.dev/config"]
